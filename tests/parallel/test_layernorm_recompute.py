"""LayerNorms' outputs are computed again for the backward pass instead of kept; gradients are the
same to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT, Block, Loss
from opt_train.model.init import initialise
from opt_train.parallel.layernorm_recompute import forget_outputs
from opt_train.parallel.recompute import recompute_and_compile
from opt_train.rehearsal.counting import MemoryCount

MODEL = {
    "name": "small",
    "layers": 3,
    "heads": 4,
    "d_model": 64,
    "ffn": 160,
    "vocab_size": 96,
    "positions": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "OPT": {},
    "no dropout": {"dropout": 0.0},
    "350M": {"layer_norm": "post", "embed_dim": 32},
}


def a_model(forgetting: bool, mode: str, variant: str) -> OPT:
    config = ModelConfig(**MODEL, **VARIANTS[variant])
    model = OPT(config)
    initialise(model, config, 3)
    for block in model.model.decoder.layers:
        assert isinstance(block, Block)
        recompute_and_compile(block, mode, compiled=False)
        if forgetting:
            forget_outputs(block)
    return model


def loss_of(model: OPT) -> Tensor:
    torch.manual_seed(5)  # dropout's
    tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(7))
    loss = model(tokens, tokens.roll(-1, dims=1), torch.ones(4))
    assert isinstance(loss, Loss)
    return loss.loss_sum


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_losses_and_gradients_are_the_same_to_the_bit(mode: str, variant: str) -> None:
    kept, forgotten = (a_model(forgetting, mode, variant) for forgetting in (False, True))
    losses = [loss_of(model) for model in (kept, forgotten)]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
    assert torch.equal(*losses)
    for (name, expected), parameter in zip(
        kept.named_parameters(), forgotten.parameters(), strict=True
    ):
        assert expected.grad is not None, name
        assert parameter.grad is not None, name
        assert torch.equal(expected.grad, parameter.grad), name


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_what_a_block_leaves_behind_is_less_by_both_outputs(mode: str) -> None:
    """Of OPT: three blocks, two outputs each, 4 x 32 tokens, 64 wide, in fp32."""
    kept, forgotten = (
        bytes_left_behind(a_model(forgetting, mode, "OPT")) for forgetting in (False, True)
    )
    assert kept - forgotten == 3 * 2 * (4 * 32) * 64 * 4


def bytes_left_behind(model: OPT) -> int:
    """What is allocated by a forward pass and lives as long as its loss."""
    memory = MemoryCount()
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        loss = loss_of(model)
    assert loss.requires_grad
    return memory.live
