"""The division by the number of ranks, half before the sum and half behind it (arXiv 2205.01068, section 2.2)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from opt_train.optim.clip import average_and_clip, predivision


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_half_of_the_division_is_the_root() -> None:
    assert predivision(True, 992) ** 2 == pytest.approx(1 / 992, rel=1e-12)
    assert predivision(True, 1) == predivision(False, 992) == 1.0


def test_sum_that_overflows_fp16_does_not_when_predivided() -> None:
    """992 ranks whose gradients agree: their sum is 992 times as large, and fp16 ends at 65504."""
    ranks, gradient = 992, 100.0
    whole = torch.full((ranks,), gradient, dtype=torch.float16)
    assert whole.sum(dtype=torch.float16).isinf()
    assert (whole * predivision(True, ranks)).sum(dtype=torch.float16).isfinite()


@pytest.mark.parametrize("data_world", [1, 2, 124, 992])
def test_average_undoes_scale_and_predivision_in_its_one_multiplication(data_world: int) -> None:
    weights = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2)]
    sums = [torch.arange(1.0, 6.0), torch.full((5,), 3.0)]
    grad_scale = torch.tensor(64.0) * predivision(True, data_world)
    for weight, each in zip(weights, sums, strict=True):
        weight.grad = each * grad_scale
    tokens = torch.tensor(16.0, dtype=torch.float64)
    clipped = average_and_clip(weights, tokens, 1e9, grad_scale)
    for weight, each in zip(weights, sums, strict=True):
        torch.testing.assert_close(weight.grad, each / 16.0)
    assert clipped.norm.item() == pytest.approx(100.0**0.5 / 16.0, rel=1e-6)
    assert clipped.clipped_norm.item() == pytest.approx(clipped.norm.item())
    assert clipped.skip.item() == 0.0


def test_clipping_goes_by_the_norm_without_the_loss_scale() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0 * 16.0 * 1024.0)
    tokens, grad_scale = torch.tensor(16.0, dtype=torch.float64), torch.tensor(1024.0)
    clipped = average_and_clip([weight], tokens, 0.5, grad_scale)
    assert clipped.norm.item() == pytest.approx(6.0)
    assert clipped.clipped_norm.item() == pytest.approx(0.5)
    torch.testing.assert_close(weight.grad.norm(), torch.tensor(0.5))


def test_norm_of_fp16_gradients_overflows_only_where_they_do() -> None:
    """Four numbers of 60,000 have a norm of 120,000, which fp16 has not: no reason to skip a step."""
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    weight.grad = torch.full((4,), 60_000.0, dtype=torch.float16)
    clipped = average_and_clip([weight], torch.tensor(1.0, dtype=torch.float64), 1.0)
    assert (clipped.norm.item(), clipped.skip.item()) == (120_000.0, 0.0)
    # Its gradients are left as they are: multiplied by the factor they would be too small for fp16.
    assert (weight.grad == 60_000.0).all()
    assert clipped.factor.item() == pytest.approx(1 / 120_000.0)
