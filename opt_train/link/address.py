"""Where the supervisor listens: a socket in a private folder with a short path, published by
rename."""

import json
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "opt-train-"
_SOCKET = "supervisor.sock"
_MAX_PATH_BYTES = 107
"""sun_path holds 108 bytes with its final zero; a run directory may lie deeper than that."""
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Address:
    """A supervisor's Unix socket and the number it leads with."""

    socket: Path
    leader: int


def make_socket_path() -> Path:
    """A path for a Unix socket in a new folder that only this user may enter."""
    for parent in (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdtemp is private
        room = len(os.fsencode(parent)) + len(_PREFIX) + len(_SOCKET) + 12
        if parent and room <= _MAX_PATH_BYTES and os.access(parent, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)) / _SOCKET
    raise OSError(
        "no writable folder with a path short enough for a Unix socket; set TMPDIR to one"
    )


def remove_socket(socket: Path) -> None:
    """Remove the socket and its folder, if they are what `make_socket_path` makes and belong to
    this user."""
    folder = socket.parent
    try:
        status = folder.lstat()
    except OSError:
        return
    ours = (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.getuid()
        and status.st_mode & 0o077 == 0
    )
    # The path may come from a file that somebody planted: nothing but a folder of our own making is
    # touched.
    if (
        ours
        and folder.name.startswith(_PREFIX)
        and socket.name == _SOCKET
        and os.listdir(folder) in ([_SOCKET], [])
    ):
        shutil.rmtree(folder, ignore_errors=True)


def publish(path: Path, address: Address) -> None:
    """Replace the file at `path`, so that agents find the supervisor."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(
        json.dumps({"address": f"unix:{address.socket}", "leader": address.leader}) + "\n"
    )
    draft.replace(path)


def read_address(path: Path) -> Address | None:
    """The published address; None if there is none, or the file is not one."""
    try:
        with path.open("rb") as file:
            published = json.loads(file.read(_MAX_FILE_BYTES))
        scheme, _, socket = published["address"].partition(":")
        leader = published["leader"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    if scheme != "unix" or type(leader) is not int or not socket.startswith("/") or "\0" in socket:
        return None
    return Address(Path(socket), leader) if len(os.fsencode(socket)) <= _MAX_PATH_BYTES else None
