"""One training step of the same model by three hands: ours, Hugging Face's, and a plain loop in
nanoGPT's manner.

All have the same sizes, tied embeddings, dropout 0, torch's fused AdamW, and take the mean loss of
the micro-batch.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from opt_train.data.batches import MicroBatch
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT, Loss
from opt_train.model.init import initialise
from opt_train.optim.adamw import apply, make_optimizer
from opt_train.optim.clip import clip
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import EngineSpec
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine

Step = Callable[[Tensor, Tensor], float]
"""Forward, backward and update over tokens and targets, both [batch, sequence]; returns the loss
before it, in nats."""

VALUES = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

OPT_125M = ModelConfig(dropout=0.0)
QUICK = ModelConfig(
    name="quick", layers=2, heads=4, d_model=64, ffn=256, vocab_size=512, positions=64, dropout=0.0
)


def ours(config: ModelConfig, bf16: bool) -> Step:
    """`opt_train`'s model, loss and optimizer; in bf16 as `trainer`, which is where its fp32
    weights are."""
    if bf16:
        return trainer(config, bf16)
    model = OPT(config)
    initialise(model, config, 0)
    optimizer = make_optimizer(model, VALUES)
    never = torch.zeros(())

    def step(tokens: Tensor, targets: Tensor) -> float:
        weights = torch.full(tokens.shape, 1.0 / tokens.numel())
        loss = model(tokens, targets, weights)
        assert isinstance(loss, Loss)
        loss.loss_sum.backward()
        apply(optimizer, never)
        return loss.loss_sum.item()

    return step


def trainer(config: ModelConfig, bf16: bool) -> Step:
    """What a rank of `opt-train train` does, alone: its engine's step, and the gradient clipped."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    precision = PrecisionConfig(compute="bf16" if bf16 else "fp32")
    layout, device = Layout(replicate=1, shard=1, tensor=1), torch.device("cpu")
    engine = make_engine(
        EngineSpec(
            model=config,
            precision=precision,
            parallel=ParallelConfig(),
            layout=layout,
            device=device,
            values=VALUES,
            seed=0,
        )
    )

    def step(tokens: Tensor, targets: Tensor) -> float:
        sums = engine.forward_backward([MicroBatch(tokens, targets, torch.ones(len(tokens)))])
        engine.apply(
            clip(engine.grad_norm(torch.tensor(float(tokens.numel()), dtype=torch.float64)), 1.0)
        )
        return sums.loss_sum.item() / tokens.numel()

    return step


def transformers_opt(config: ModelConfig, bf16: bool) -> Step:
    """Hugging Face's `OPTForCausalLM` with its sdpa attention and its own loss; in bf16 under
    autocast."""
    # The other contestants do not pay for it.
    from transformers import OPTConfig, OPTForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            word_embed_proj_dim=config.d_model,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            ffn_dim=config.ffn,
            max_position_embeddings=config.positions,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    model.train()

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        # It shifts labels itself, so that the last token would go without a target: shifted labels
        # are given instead.
        loss: Tensor = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        return loss

    return _autocast_step(model, loss_of, bf16)


def plain(config: ModelConfig, bf16: bool, device: torch.device | None = None) -> Step:
    """Plain modules and `F.cross_entropy` over all logits at once, as nanoGPT does it; in bf16
    under autocast."""
    torch.manual_seed(0)
    model = PlainDecoder(config).to(device)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    return _autocast_step(model, loss_of, bf16)


CONTESTANTS = {"ours": ours, "trainer": trainer, "transformers": transformers_opt, "plain": plain}


class PlainBlock(nn.Module):
    """One pre-LayerNorm decoder layer with query, key and value in one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.first_norm, self.second_norm = (
            nn.LayerNorm(config.d_model),
            nn.LayerNorm(config.d_model),
        )
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        self.up, self.down = (
            nn.Linear(config.d_model, config.ffn),
            nn.Linear(config.ffn, config.d_model),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, d_model] -> the same shape."""
        parts = self.qkv(self.first_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(-2))
        fed: Tensor = self.down(F.relu(self.up(self.second_norm(hidden))))
        return hidden + fed


class PlainDecoder(nn.Module):
    """OPT's sizes; nothing in it is ours."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.positions, config.d_model)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [batch, sequence] -> logits [batch, sequence, vocabulary]."""
        hidden = self.tokens(tokens) + self.positions(
            torch.arange(tokens.shape[1], device=tokens.device)
        )
        for layer in self.layers:
            hidden = layer(hidden)
        return F.linear(self.norm(hidden), self.tokens.weight)


def _autocast_step(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], bf16: bool
) -> Step:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=VALUES["lr"],
        betas=(VALUES["beta1"], VALUES["beta2"]),
        eps=VALUES["eps"],
        weight_decay=VALUES["weight_decay"],
        fused=True,
    )

    def step(tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def micro_batch(config: ModelConfig, batch: int, sequence_length: int) -> tuple[Tensor, Tensor]:
    """Random tokens and the next ones, both [batch, sequence]; the same each time."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (batch, sequence_length + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
