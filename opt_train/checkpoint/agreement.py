"""Ranks that act together fail together: one rank's full disk must not leave the others in a collective for ever."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from opt_train.checkpoint.manifest import CheckpointError


def together(action: Callable[[], None], process_group: dist.ProcessGroup | None, failure: str) -> None:
    """Run `action` on every rank and agree on whether it succeeded everywhere: a barrier that nobody fails to reach.

    Raises:
        CheckpointError: `action` failed on some rank; here with the reason, if it was here.
    """
    error: BaseException | None = None
    try:
        action()
    except (Exception, CheckpointException) as caught:  # anything else than agreeing would leave the others waiting
        error = caught
    failed = int(error is not None)
    if dist.is_initialized():
        votes = torch.tensor(failed, dtype=torch.int64)
        dist.all_reduce(votes, group=process_group)
        failed = int(votes.item())
    if error is not None:
        raise CheckpointError(f"{failure}: {_reason_of(error)}") from error
    if failed:
        raise CheckpointError(f"{failure}: {failed} other rank{'s' if failed > 1 else ''} failed")


def _reason_of(error: BaseException) -> str:
    """One line: of torch's collected failures the first rank's, otherwise the error's own."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_reason_of(cause)}"
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
