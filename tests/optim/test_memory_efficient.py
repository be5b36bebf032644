"""AdamW over fp16 weights against torch's over fp32 ones, which is all it may differ from by
rounding."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from opt_train.checkpoint import manifest
from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.restore import restore
from opt_train.checkpoint.save import save
from opt_train.checkpoint.tensors import ModelAndOptimizer, tensors_of
from opt_train.model.config import ModelConfig
from opt_train.optim.adamw import apply, make_optimizer, really_in_force
from opt_train.optim.memory_efficient import MemoryEfficientAdamW
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import EngineSpec
from opt_train.parallel.fsdp import build
from opt_train.parallel.layout import Layout
from tests.optim.syncs import Syncs

VALUES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
TINY = ModelConfig(name="tiny", layers=1, heads=2, d_model=16, ffn=32, vocab_size=64, positions=16)
CPU = torch.device("cpu")
YES, NO = torch.tensor(1.0), torch.tensor(0.0)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def layers(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16)).to(dtype)


def gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 4 - 3)
        parameter.grad = (drawn * scale).to(parameter.dtype)


def test_in_fp32_it_is_torchs_adamw() -> None:
    ours, theirs = layers(torch.float32), layers(torch.float32)
    reference = make_optimizer(theirs, VALUES)
    assert isinstance(reference, torch.optim.AdamW)
    matrices, vectors = (group["params"] for group in reference.param_groups)
    own = [
        [p for p in ours.parameters() if p.ndim >= 2],
        [p for p in ours.parameters() if p.ndim < 2],
    ]
    assert [len(own[0]), len(own[1])] == [len(matrices), len(vectors)]
    settings = {"betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = MemoryEfficientAdamW(
        [
            {"params": own[0], "weight_decay": 0.1, **settings},
            {"params": own[1], "weight_decay": 0.0, **settings},
        ],
        lr=1e-2,
    )
    for step in range(50):
        gradients(ours, step)
        gradients(theirs, step)
        apply(optimizer, NO)
        apply(reference, NO)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizer.state[one][name], reference.state[other][name], rtol=2e-6, atol=1e-9
            )
        assert optimizer.state[one]["step"] == reference.state[other]["step"] == 50


def test_update_is_computed_in_fp32_and_rounded_once() -> None:
    """Each fp16 weight is the nearest to what torch computes in fp32 from the same weight, gradient
    and moments."""
    narrow, wide = layers(torch.float16), layers(torch.float32)
    optimizer, reference = make_optimizer(narrow, VALUES), make_optimizer(wide, VALUES)
    assert isinstance(optimizer, MemoryEfficientAdamW)
    for step in range(20):
        with torch.no_grad():
            for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
                other.copy_(one)
        gradients(narrow, step)
        for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
            other.grad = one.grad.float()
        apply(optimizer, NO)
        apply(reference, NO)
        for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
            # Where fp32 rounding lies across the middle between two fp16 numbers they may differ by
            # the last bit.
            assert (one != other.half()).float().mean() < 0.01
            torch.testing.assert_close(one, other.half(), rtol=2e-3, atol=1e-6)
            assert optimizer.state[one]["exp_avg_sq"].dtype == torch.float32


def test_gradients_are_unscaled_in_fp32_and_not_before() -> None:
    """Averaged over half a million tokens a gradient is below fp16's smallest number; its scaled
    sum is not."""
    tokens = 500_000.0
    plain, scaled = layers(torch.float16), layers(torch.float16)
    one, other = make_optimizer(plain, VALUES), make_optimizer(scaled, VALUES)
    for parameter, sums in zip(plain.parameters(), scaled.parameters(), strict=True):
        sums.grad = torch.full_like(sums, 0.01)
        assert (sums.grad / tokens == 0).all()
        parameter.grad = sums.grad.clone()
    apply(one, NO, torch.tensor(1.0 / tokens))
    apply(other, NO, torch.tensor(1.0))
    for parameter, sums in zip(plain.parameters(), scaled.parameters(), strict=True):
        expected = other.state[sums]["exp_avg"] / tokens
        assert expected.abs().min() > 0
        torch.testing.assert_close(one.state[parameter]["exp_avg"], expected, rtol=1e-6, atol=0.0)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    tensors = [t for p in model.parameters() for t in (p, *optimizer.state[p].values())]
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_skipped_step_changes_nothing(value: float) -> None:
    model = layers(torch.float16)
    optimizer = make_optimizer(model, VALUES)
    gradients(model, 0)
    apply(optimizer, NO)
    before = everything(model, optimizer)
    gradients(model, 1)
    model[0].weight.grad[3, 5] = value
    apply(optimizer, YES, torch.tensor(value))
    assert everything(model, optimizer) == before
    gradients(model, 2)
    apply(optimizer, NO)
    assert everything(model, optimizer) != before
    assert really_in_force(optimizer) == {**VALUES, "updates": 2}


def test_update_never_waits_for_the_device() -> None:
    model = layers(torch.float16)
    optimizer = make_optimizer(model, VALUES)
    gradients(model, 0)
    with Syncs() as syncs:
        apply(optimizer, NO, torch.tensor(0.5))
    assert syncs.seen == []


def sharded(precision: PrecisionConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build(
        EngineSpec(
            model=TINY,
            precision=precision,
            parallel=ParallelConfig(),
            layout=Layout(1, 1, 1),
            device=CPU,
            values=VALUES,
            seed=1,
        )
    )
    return model, make_optimizer(model, VALUES)


def trained_gradients(model: nn.Module) -> None:
    block = torch.randint(0, TINY.vocab_size, (2, 17), generator=torch.Generator().manual_seed(5))
    model(block[:, :-1], block[:, 1:], None, torch.tensor(4.0)).loss_sum.backward()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("precision", "weight", "gradient", "moments"),
    [
        (PrecisionConfig(compute="fp32"), 4, 4, 8),
        (PrecisionConfig(compute="bf16"), 4, 4, 8),
        (PrecisionConfig(compute="fp16"), 4, 4, 8),
        (PrecisionConfig(compute="fp16", weights="fp16"), 2, 2, 8),
    ],
)
def test_bytes_a_parameter_are_those_of_the_documentation(
    precision: PrecisionConfig, weight: int, gradient: int, moments: int
) -> None:
    model, optimizer = sharded(precision)
    trained_gradients(model)
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    assert sum(local(p).nbytes for p in parameters) == weight * count
    assert sum(local(p.grad).nbytes for p in parameters) == gradient * count
    state = [
        local(t) for p in parameters for name, t in optimizer.state[p].items() if name != "step"
    ]
    assert sum(tensor.nbytes for tensor in state) == moments * count
    page = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()
    row = f"| {precision.compute} | {precision.weights} | {weight} | {gradient} | {moments} "
    assert f"{row}| {weight + gradient + moments} |" in page


@pytest.mark.usefixtures("world")
def test_checkpoint_brings_moments_back_in_fp32(tmp_path: Path) -> None:
    """torch's `load_state_dict` casts state to the weights' type: moments of 1e-10 would come back
    as zeros."""
    precision = PrecisionConfig(compute="fp16", weights="fp16")
    model, optimizer = sharded(precision)
    trained_gradients(model)
    apply(optimizer, NO, torch.tensor(1e-3))
    folder = tmp_path / "checkpoints" / "1.00" / "step-00000001"
    files = save(tensors_of(model, optimizer), {}, folder)
    named = {file.path: (file.bytes, file.sha256) for file in files}
    commit_manifest(folder, build_manifest(folder, "1.00", 1, named))
    expected = {
        name: local(tensor).clone() for name, tensor in tensors_of(model, optimizer).items()
    }
    assert any(
        0 < tensor[tensor != 0].abs().min() < 1e-8
        for tensor in expected.values()
        if (tensor != 0).any()
    )

    other, into = sharded(precision)
    content = (folder / manifest.MANIFEST).read_bytes()
    restore(
        ModelAndOptimizer(other, into),
        folder,
        manifest.read(folder, hashlib.sha256(content).hexdigest()),
    )
    found = tensors_of(other, into)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(local(found[name]), tensor), name
    assert really_in_force(into)["updates"] == 1
