"""Ranks that act together fail together: one rank's full disk must not leave the others in a
collective for ever."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from opt_train.checkpoint.manifest import CheckpointError


def all_or_none(
    action: Callable[[], None], process_group: dist.ProcessGroup | None, failure: str
) -> None:
    """Run `action` on every rank and agree on whether it succeeded everywhere: a barrier that
    nobody fails to reach.

    Raises:
        CheckpointError: `action` failed on some rank; with the reason, its own where it failed, the
            first failing rank's elsewhere: whichever rank is heard first, the journal has the
            reason.
    """
    error: BaseException | None = None
    try:
        action()
    except (
        Exception,
        CheckpointException,
    ) as caught:  # anything else than agreeing would leave the others waiting
        error = caught
    failed = int(error is not None)
    if dist.is_initialized():
        votes = torch.tensor(failed, dtype=torch.int64)
        # Otherwise one rank's error leaves the others in a collective until the group's timeout,
        # half an hour by torch's default.
        dist.all_reduce(votes, group=process_group)
        failed = int(votes.item())
    if not failed:
        return
    reason = "" if error is None else _reason_of(error)
    reasons = _of_all(reason, process_group)
    if error is not None:
        raise CheckpointError(f"{failure}: {reason}") from error
    rank = min(rank for rank, reason in enumerate(reasons) if reason)
    raise CheckpointError(f"{failure}: rank {rank}: {reasons[rank]}")


def _of_all(reason: str, process_group: dist.ProcessGroup | None) -> list[str]:
    if not dist.is_initialized():
        return [reason]
    reasons = [""] * dist.get_world_size(process_group)
    dist.all_gather_object(reasons, reason, group=process_group)
    return reasons


def _reason_of(error: BaseException) -> str:
    """One line: of torch's collected failures the first rank's, otherwise the error's own."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_reason_of(cause)}"
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
