"""Files that a shared file system shows late.

What one node has made or renamed, another node sees when its client's cache has run out: until then
a folder is there and a file in it is not, or its handle is stale (NFS: `acdirmax`, Lustre after a
failover). A checkpoint must not be given up for that. Standard library only.
"""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from opt_train.checkpoint.manifest import CheckpointError

LATE_SECONDS = 20.0
"""For so long a file may be missing from a folder that is there, or its handle be stale, before
that is believed."""
LOOK_AGAIN_SECONDS = 1.0

_Found = TypeVar("_Found")


def retry_while_late(
    folder: Path,
    work: Callable[[], _Found],
    waiting: Callable[[], None] = lambda: None,
    seconds: float = LATE_SECONDS,
) -> _Found:
    """`work`, and again while it may have met an old state of `folder`, for `seconds` at most.

    Args:
        waiting: called before each time but the first.

    Raises:
        CheckpointError: what `work` raised last.
    """
    # Monotonic: a clock that is set back must not prolong the wait.
    end = time.monotonic() + seconds
    while True:
        try:
            return work()
        except CheckpointError as error:
            if time.monotonic() >= end or not may_be_late(folder, error):
                raise
        time.sleep(LOOK_AGAIN_SECONDS)
        waiting()


def may_be_late(folder: Path, error: CheckpointError) -> bool:
    """Whether `error` may come of an old state of `folder`, and be over in a moment."""
    cause = error.__cause__
    return (
        isinstance(cause, OSError)
        and cause.errno in (errno.ENOENT, errno.ESTALE)
        and folder.is_dir()
    )
