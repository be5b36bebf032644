"""Messages to the writer of the journal: a note, a request to stop.

One process writes the journal, so everybody else leaves a file: whole by rename, in order by its
name, which begins with the time in nanoseconds. It is removed when what it asks for is journalled:
a supervisor that dies in between reads it again, so a message must bear being read twice.

Anybody who may write the folder may leave anything in it. The supervisor must not hang on a FIFO,
follow a link out of the run, read a gigabyte or die of broken JSON: what is no message is moved
into `refused/` for a person to look at.
"""

import contextlib
import errno
import json
import os
import secrets
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_logbook.record.durable_file import replace_file
from opt_logbook.record.run_directory import RunDirectory

MESSAGE_BYTES_MAX = 1 << 16
REFUSED = "refused"
"""Folder inside the inbox for files that are no message; they lie there for a person to look at."""

_NOT_A_MESSAGE = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EPERM)
"""What opening says of a link, a socket, a device or a file that is not for us; any other error may
pass."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A message that waits. Remove it once what it asks for is durable."""

    path: Path
    message: dict[str, Any]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def drop(run: RunDirectory, message: Mapping[str, Any]) -> Path:
    """Leave `message` for the writer of the journal and return its file; it is whole or not there.

    Raises:
        ValueError: the message is longer than `MESSAGE_BYTES_MAX`, or no JSON.
    """
    text = json.dumps(dict(message), allow_nan=False, ensure_ascii=False).encode("utf-8", "replace")
    if len(text) > MESSAGE_BYTES_MAX:
        raise ValueError(
            f"a message of {len(text)} bytes is too long; {MESSAGE_BYTES_MAX} are the most"
        )
    run.inbox.mkdir(exist_ok=True)
    # A clock may jump back, so the order is only as good as the clock: no message may rest on one
    # before it. Random digits, since on two hosts over NFS two writers may have one pid.
    name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}.json"
    path = run.inbox / name
    # Its partial file is hidden, which `waiting` leaves alone.
    replace_file(path, text, durable=True)
    return path


def waiting(run: RunDirectory) -> list[Dropped]:
    """The messages that wait, oldest first; they stay until they are removed. What is no message is
    set aside."""
    messages: list[Dropped] = []
    for path in _files(run):
        try:
            messages.append(Dropped(path, _read(path)))
        except FileNotFoundError:
            continue
        except OSError as error:
            # A sick disk or too many open files say nothing about the message: it waits for the
            # next time.
            if error.errno in _NOT_A_MESSAGE:
                _refuse(run, path)
        except (ValueError, RecursionError):
            _refuse(run, path)
    return messages


def peek(run: RunDirectory) -> list[dict[str, Any]]:
    """The messages that wait, oldest first, for whoever is not the writer of the journal and
    changes nothing."""
    messages: list[dict[str, Any]] = []
    for path in _files(run):
        # What is no message, or is gone by now, is the writer's to deal with.
        with contextlib.suppress(OSError, ValueError, RecursionError):
            messages.append(_read(path))
    return messages


def _files(run: RunDirectory) -> list[Path]:
    """What lies in the inbox, oldest first, partial files apart."""
    try:
        names = sorted(os.listdir(run.inbox))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [run.inbox / name for name in names if not name.startswith(".") and name != REFUSED]


def _read(path: Path) -> dict[str, Any]:
    """The message in the file.

    Raises:
        ValueError: it is no regular file, too long, or not a JSON object with a `kind`.
    """
    # No links followed, and a FIFO must not make the supervisor wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        # Asked of what is open: the name may stand for another file by now.
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        # One byte more than is allowed shows that it is too long; how much too long is no matter.
        text = os.read(descriptor, MESSAGE_BYTES_MAX + 1)
    finally:
        os.close(descriptor)
    if len(text) > MESSAGE_BYTES_MAX:
        raise ValueError("too long")
    payload = json.loads(text)
    if not isinstance(payload, dict) or not isinstance(payload.get("kind"), str):
        raise ValueError("not a message")
    return payload


def _refuse(run: RunDirectory, path: Path) -> None:
    # If even this fails the file stays, and is refused again the next time: the supervisor must
    # live.
    with contextlib.suppress(OSError):
        (run.inbox / REFUSED).mkdir(exist_ok=True)
        path.rename(run.inbox / REFUSED / path.name)
