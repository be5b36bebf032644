"""Who leads a run, as whoever looks at it from outside can know: by its lock.

A process of this host lives or does not. Of another host only silence can be seen: a supervisor
touches its lock every few seconds, also while it waits for nodes; one that has not for long is
neither dead nor fine (invariant 11).
"""

import os
import time
from dataclasses import dataclass

from opt_logbook.record.lock import Holder, holder_of
from opt_logbook.record.run_directory import RunDirectory

SILENT_SECONDS = 60.0
"""Many times what a supervisor takes between two touches, and what clocks and caches of shared file
systems are apart."""


@dataclass(frozen=True, slots=True)
class Leadership:
    """What the lock says, and when it was last touched."""

    holder: Holder | None
    """None: nobody has the lock, or whoever had it is known to be gone."""
    last: Holder | None
    """Who the lock names, dead or alive."""
    touched: float
    """When it was last touched, Unix seconds; 0: there is no lock."""

    @property
    def has_supervisor(self) -> bool:
        return self.holder is not None and self.holder.leader > 0

    @property
    def silent_seconds(self) -> float:
        """How long nothing has been seen of a supervisor that may live; 0: it was, a moment ago."""
        silent = time.time() - self.touched
        return silent if self.holder is not None and silent > SILENT_SECONDS else 0.0


def read_leadership(run: RunDirectory) -> Leadership:
    """Who leads the run now. Changes nothing."""
    last = holder_of(run)
    gone = last is None or last.is_gone(Holder.myself())
    try:
        touched = os.stat(run.lock).st_mtime
    except FileNotFoundError:
        touched = 0.0
    return Leadership(None if gone else last, last, touched)


def place_of(holder: Holder) -> str:
    """``process 17 on n1 (Slurm job 4)``."""
    job = f" (Slurm job {holder.slurm_job})" if holder.slurm_job else ""
    return f"process {holder.pid} on {holder.host}{job}"
