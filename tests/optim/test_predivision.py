"""The division by the number of ranks, half before the sum and half behind it (arXiv 2205.01068,
section 2.2)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from opt_train.optim.adamw import apply
from opt_train.optim.clip import UpdateDecision, clip, global_norm, predivision


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def judged(
    gradients: list[torch.Tensor], tokens: float, max_norm: float, grad_scale: torch.Tensor | None
) -> UpdateDecision:
    counted = torch.tensor(tokens, dtype=torch.float64)
    return clip(global_norm(gradients, [1] * len(gradients), counted, grad_scale), max_norm)


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
    sums = [torch.arange(1.0, 6.0), torch.full((5,), 3.0)]
    grad_scale = torch.tensor(64.0) * predivision(True, data_world)
    decision = judged([each * grad_scale for each in sums], 16.0, 1e9, grad_scale)
    assert decision.factor.item() == pytest.approx(1 / 16.0 / grad_scale.item(), rel=1e-6)
    assert decision.norm.item() == pytest.approx(100.0**0.5 / 16.0, rel=1e-6)
    assert decision.clipped_norm.item() == pytest.approx(decision.norm.item())
    assert decision.skip.item() == 0.0


def test_clipping_goes_by_the_norm_without_the_loss_scale() -> None:
    gradient = torch.full((4,), 3.0 * 16.0 * 1024.0)
    decision = judged([gradient], 16.0, 0.5, torch.tensor(1024.0))
    assert decision.norm.item() == pytest.approx(6.0)
    assert decision.clipped_norm.item() == pytest.approx(0.5)
    torch.testing.assert_close((gradient * decision.factor).norm(), torch.tensor(0.5))


def test_optimizer_moves_by_the_averaged_and_clipped_gradient() -> None:
    """The kernel multiplies: moments and weights come out as torch's own clipping leaves them."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1.0, 1.0, 64)) for _ in range(2))
    one, other = (torch.optim.AdamW([weight], lr=0.1, fused=True) for weight in (ours, theirs))
    for _ in range(5):
        average = torch.randn(64)
        theirs.grad = average.clone()
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        other.step()
        ours.grad = average * 16.0 * 1024.0
        decision = judged([ours.grad], 16.0, 0.5, torch.tensor(1024.0))
        apply(one, decision.skip, decision.factor)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            one.state[ours]["exp_avg"], other.state[theirs]["exp_avg"], rtol=1e-6, atol=1e-8
        )


def test_norm_of_fp16_gradients_overflows_only_where_they_do() -> None:
    """Four numbers of 60,000 have a norm of 120,000, which fp16 has not: no reason to skip a
    step."""
    gradient = torch.full((4,), 60_000.0, dtype=torch.float16)
    decision = judged([gradient], 1.0, 1.0, None)
    assert (decision.norm.item(), decision.skip.item()) == (120_000.0, 0.0)
    # Its gradients are left as they are: multiplied by the factor they would be too small for fp16.
    assert (gradient == 60_000.0).all()
    assert decision.factor.item() == pytest.approx(1 / 120_000.0)
