"""An instrument that sees no wait would let every test of it pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.optim.syncs import Syncs


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.__setitem__(x > 0, torch.ones(2)),
        lambda x: x.unique(),
    ],
)
def test_what_the_host_waits_for_is_seen(wait: Callable[[Tensor], object]) -> None:
    values = torch.tensor([1.0, -1.0, 2.0])
    with Syncs() as syncs:
        wait(values)
    assert syncs.seen


@pytest.mark.parametrize(
    "queued",
    [
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.index_put_((torch.tensor([0, 2]),), torch.ones(2)),
        lambda x: x.index_add_(0, torch.tensor([0, 2]), torch.ones(2)),
        lambda x: (x.isfinite().all().float(), x.norm().clamp(max=1.0)),
    ],
)
def test_what_the_device_does_by_itself_is_not(queued: Callable[[Tensor], object]) -> None:
    values = torch.tensor([1.0, -1.0, 2.0])
    with Syncs() as syncs:
        queued(values)
    assert syncs.seen == []
