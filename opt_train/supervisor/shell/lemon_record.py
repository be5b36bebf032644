"""The record of repeat offenders that all runs of a site share: one file a run in one folder.

Each run writes its own file alone, whole, by rename, and reads those of the others: so several
supervisors may write at once, on any shared file system, and a crash at any moment leaves a file
as it was before or after. What a file says is what its run's journal says; a supervisor that starts
writes it again, and so no offence is lost or counted twice. A file may be removed by hand, to
forget: of a run that has ended it does not come back.
"""

import json
import logging
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opt_logbook.record.durable_file import replace_file
from opt_logbook.record.hardware import Offence
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.run_config import RunConfig
from opt_train.run.lemons import TEXT_CHARACTERS_MAX

FILE_BYTES_MAX = 1 << 20
FOLDER = ".lemons"
"""Beside the run directories, where `supervisor.lemons` names no other."""

log = logging.getLogger(__name__)


class LemonRecord:
    """The folder. A run is its name and when it was created (Unix seconds): another one of the same
    name is another run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, run: str, created: float, offences: tuple[Offence, ...]) -> None:
        """Replace the run's file.

        Raises:
            OSError: it could not be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(offence) for offence in offences], indent=1) + "\n"
        replace_file(self._folder / _name_of(run, created), text.encode(), durable=True)

    def read_others(self, run: str, created: float) -> tuple[Offence, ...]:
        """The offences of all runs but this one, oldest first. A file that cannot be read is left
        out: no run waits for the record."""
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return ()
        except OSError as error:
            log.warning("the record of repeat offenders cannot be read: %s", error)
            return ()
        # A run's own failures come from its journal; from here they would count twice.
        own = _name_of(run, created)
        # Those that are being written are hidden.
        others = [n for n in names if n.endswith(".json") and n[0] != "." and n != own]
        offences = [offence for name in others for offence in _read(self._folder / name)]
        return tuple(sorted(offences, key=lambda offence: offence.time))


def lemon_folder(config: RunConfig, run: RunDirectory) -> Path:
    """Where the record lies: as `supervisor.lemons` says, or beside the run directories."""
    named = config.supervisor.lemons
    return Path(named) if named else run.path.parent / FOLDER


def _name_of(run: str, created: float) -> str:
    return f"{run}-{round(1000 * created)}.json"


def _read(path: Path) -> Iterator[Offence]:
    try:
        listed = json.loads(_bytes_of(path))
        yield from [_offence(fields) for fields in listed]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.warning("%s is no record of offences, and is left out: %s", path, error)


def _bytes_of(path: Path) -> bytes:
    # Others may write this folder: no link is followed, and a FIFO makes nobody wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise ValueError(f"longer than {FILE_BYTES_MAX} bytes")
    return content


def _offence(fields: dict[str, Any]) -> Offence:
    """Raises ValueError, TypeError or KeyError: it is none."""
    texts = {name: fields[name] for name in ("run", "node", "cause", "detail", "gpu")}
    time = fields["time"]
    # They come into the journal of every run that meets the node.
    for text in texts.values():
        if not isinstance(text, str) or len(text) > TEXT_CHARACTERS_MAX:
            raise TypeError("a field is no text, or too long")
    if not isinstance(time, int | float) or not math.isfinite(time):
        raise TypeError("its time is no number")
    return Offence(time=float(time), **texts)
