"""The decoder against Hugging Face's independent implementation of OPT."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import OPTConfig, OPTForCausalLM

from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT, Loss
from opt_train.model.init import initialise
from opt_train.model.loss import cross_entropy_sum
from opt_train.model.sizes import flops_per_token, parameter_count

TINY = ModelConfig(name="tiny", layers=2, heads=4, d_model=64, ffn=160, vocab_size=512, positions=64, dropout=0.0)


def hugging_face(config: ModelConfig) -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            word_embed_proj_dim=config.d_model,
            num_hidden_layers=config.layers,
            ffn_dim=config.ffn,
            num_attention_heads=config.heads,
            max_position_embeddings=config.positions,
            dropout=0.0,
            attention_dropout=0.0,
        )
    ).float()


def both() -> tuple[OPT, OPTForCausalLM]:
    """Ours and theirs with the same weights, large enough ones that every path shows in the output."""
    ours, theirs = OPT(TINY), hugging_face(TINY)
    initialise(ours, replace(TINY, init_std=0.1), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return ours, theirs


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    # Id 1 is Hugging Face's padding, whose embedding gets no gradient there.
    block = torch.randint(4, TINY.vocab_size, (3, TINY.positions + 1), generator=torch.Generator().manual_seed(7))
    return block[:, :-1], block[:, 1:]


def test_parameter_names_are_hugging_faces() -> None:
    theirs = {name for name, _ in hugging_face(TINY).named_parameters()}
    assert {name for name, _ in OPT(TINY).named_parameters()} == theirs - {"lm_head.weight"}


def test_logits_equal_hugging_face() -> None:
    ours, theirs = both()
    tokens, _ = sample()
    assert (ours(tokens) - theirs(tokens).logits).abs().max().item() < 1e-5


def test_gradients_equal_hugging_face() -> None:
    ours, theirs = both()
    tokens, targets = sample()
    loss = ours(tokens, targets)
    assert isinstance(loss, Loss)
    loss.loss_sum.backward()
    reference = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    reference.backward()
    assert loss.loss_sum.item() == pytest.approx(reference.item(), rel=1e-6)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[name].grad
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


def test_weightless_sequence_changes_neither_loss_nor_gradient() -> None:
    ours, _ = both()
    tokens, targets = sample()
    ours(tokens[:2], targets[:2]).loss_sum.backward()
    expected = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    padded = ours(tokens, targets, torch.tensor([1.0, 1.0, 0.0]))
    padded.loss_sum.backward()
    for gradient, parameter in zip(expected, ours.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)


def test_sliced_loss_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice border that drops or doubles a token would go unnoticed in a loss of thousands of tokens."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float32, requires_grad=True)
    embedding = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (37,), generator=generator)
    weights = torch.rand(37, generator=generator)
    reference = (F.cross_entropy(F.linear(hidden, embedding), targets, reduction="none") * weights).sum()
    expected = torch.autograd.grad(reference, (hidden, embedding))
    monkeypatch.setattr("opt_train.model.loss.LOGITS_AT_ONCE", 50 * 5)
    total = cross_entropy_sum(hidden, embedding, targets, weights)
    found = torch.autograd.grad(total * 2.0, (hidden, embedding))
    torch.testing.assert_close(total, reference, rtol=1e-6, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other * 2.0, rtol=1e-5, atol=1e-5)


def test_activation_norm_is_that_of_the_last_layer() -> None:
    ours, theirs = both()
    tokens, targets = sample()
    loss = ours(tokens, targets)
    captured: list[torch.Tensor] = []
    theirs.model.decoder.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: captured.append(output[0] if isinstance(output, tuple) else output)
    )
    theirs(tokens)
    assert loss.activation_squares.item() == pytest.approx(captured[0].square().sum().item(), rel=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    model = OPT(replace(TINY, dropout=0.5))
    initialise(model, TINY, seed=0)
    tokens, _ = sample()
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_initial_weights_follow_the_recipe() -> None:
    model = OPT(TINY)
    initialise(model, TINY, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert parameter.unique().tolist() == [1.0 if "layer_norm.weight" in name else 0.0], name
        else:
            expected = TINY.init_std / (2.0 if name.endswith(("out_proj.weight", "fc2.weight")) else 1.0)
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    one, other, deeper = OPT(TINY), OPT(TINY), OPT(replace(TINY, layers=3))
    initialise(one, TINY, seed=0)
    torch.manual_seed(99)
    initialise(other, TINY, seed=1)
    initialise(deeper, TINY, seed=0)
    assert not torch.equal(one.model.decoder.embed_tokens.weight, other.model.decoder.embed_tokens.weight)
    assert torch.equal(one.model.decoder.layers[1].fc1.weight, deeper.model.decoder.layers[1].fc1.weight)
    assert not torch.equal(one.model.decoder.layers[0].fc1.weight, one.model.decoder.layers[1].fc1.weight)


OPT_TABLE = {
    # layers, heads, d_model, ffn -> parameters of the released models (arXiv 2205.01068, table 1).
    (12, 12, 768, 3072): 125_239_296,
    (24, 32, 2048, 8192): 1_315_758_080,
    (32, 32, 2560, 10240): 2_651_596_800,
    (32, 32, 4096, 16384): 6_658_473_984,
    (40, 40, 5120, 20480): 12_853_473_280,
    (48, 56, 7168, 28672): 29_974_540_288,
    (64, 72, 9216, 36864): 65_719_701_504,
    (96, 96, 12288, 49152): 174_604_468_224,
}


@pytest.mark.parametrize("shape", OPT_TABLE)
def test_parameter_count_is_the_papers(shape: tuple[int, int, int, int]) -> None:
    layers, heads, d_model, ffn = shape
    config = ModelConfig(layers=layers, heads=heads, d_model=d_model, ffn=ffn)
    assert parameter_count(config) == OPT_TABLE[shape]


def test_parameter_count_is_the_modules() -> None:
    assert parameter_count(TINY) == sum(p.numel() for p in OPT(TINY).parameters())
    assert flops_per_token(TINY, 64) == 6 * parameter_count(TINY) + 12 * 2 * 64 * 64
