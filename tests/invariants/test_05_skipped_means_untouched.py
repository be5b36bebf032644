"""A skipped step leaves weights, moments and step counts as they were, to the bit; and deciding it syncs nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT
from opt_train.optim.adamw import apply, make_optimizer, put_in_force, really_in_force
from opt_train.optim.clip import average_and_clip
from opt_train.parallel.config import PrecisionConfig
from opt_train.parallel.fsdp import build, make_mesh
from opt_train.parallel.layout import Layout

CPU = torch.device("cpu")
TINY = ModelConfig(name="tiny", layers=2, heads=4, d_model=32, ffn=64, vocab_size=64, positions=16)
VALUES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained() -> tuple[OPT, torch.optim.AdamW]:
    """A sharded model with two updates behind it, so that moments are not zero."""
    model = build(TINY, PrecisionConfig(compute="fp32"), make_mesh(Layout(1, 1, 1), CPU), CPU, seed=0)
    optimizer = make_optimizer(model, VALUES)
    for _ in range(2):
        backward(model)
        update(model, optimizer)
    return model, optimizer


def backward(model: OPT) -> None:
    block = torch.randint(0, TINY.vocab_size, (2, 17))
    model(block[:, :-1], block[:, 1:]).loss_sum.backward()


def update(model: OPT, optimizer: torch.optim.AdamW) -> bool:
    clipped = average_and_clip(model.parameters(), torch.tensor(32.0, dtype=torch.float64), 1.0, None, 1)
    put_in_force(optimizer, VALUES)
    skip = clipped.skip
    apply(optimizer, skip)
    return bool(skip)


def everything(model: OPT, optimizer: torch.optim.AdamW) -> dict[str, bytes]:
    """The bytes of all that training carries."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors[name] = parameter.to_local()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{name}.{moment}"] = state[moment].to_local()
        tensors[f"{name}.step"] = state["step"]
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradient_changes_nothing(value: float) -> None:
    """Multiplying a step by 0 would leave NaN behind: 0 x NaN is NaN."""
    model, optimizer = trained()
    before = everything(model, optimizer)
    backward(model)
    model.model.decoder.layers[1].fc1.weight.grad.to_local()[3, 5] = value
    assert update(model, optimizer)
    assert everything(model, optimizer) == before
    assert really_in_force(optimizer)["updates"] == 2
    # And the next step is as if the skipped one had never been.
    backward(model)
    assert not update(model, optimizer)
    assert everything(model, optimizer) != before
    assert really_in_force(optimizer)["updates"] == 3


def test_batch_without_tokens_is_skipped() -> None:
    """A division by no tokens at all must not reach the weights."""
    model, optimizer = trained()
    before = everything(model, optimizer)
    backward(model)
    clipped = average_and_clip(model.parameters(), torch.tensor(0.0, dtype=torch.float64), 1.0, None, 1)
    apply(optimizer, clipped.skip)
    assert everything(model, optimizer) == before


class Syncs(TorchDispatchMode):
    """Counts what makes a host wait for its device: every `.item()` is one of these."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "is_nonzero" in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_optimizer_path_never_waits_for_the_device() -> None:
    model, optimizer = trained()
    backward(model)
    tokens = torch.tensor(32.0, dtype=torch.float64)
    with Syncs() as syncs:
        clipped = average_and_clip(model.parameters(), tokens, 1.0, None, 1)
        put_in_force(optimizer, VALUES)
        apply(optimizer, clipped.skip)
    assert syncs.seen == []
    with Syncs() as syncs:
        clipped.norm.item()
    assert len(syncs.seen) == 1  # the instrument works
