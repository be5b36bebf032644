"""Where files of snapshots lie on a node's own disk, and which names they may have.

A file is `<node directory>/opt_train-<uid>/<run>/<node>/node/<attempt>/step-<step>/<name>`. Every
name comes from a command or a peer at some time, so it must match a form before a path is made of
it: nothing may lead out of the folder. Folders are this user's alone, and one that is not is
refused: the directory may be `/tmp`, where anybody could have made it first.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path, PurePosixPath

from opt_train.checkpoint.durable_file import sync_folder
from opt_train.checkpoint.manifest import MANIFEST
from opt_train.host.processes import mark_of

PATH_FORM = re.compile(r"(memory|node)/[0-9]{1,9}\.[0-9]{1,9}/step-[0-9]{8,18}")
NAME_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
PARTIAL = ".partial"
"""Ends the name of a file that is not whole yet."""
RESTORE = "restore"
"""The folder of links by which ranks find files, in memory and on disk alike."""
_MAKE_ATTEMPTS = 5

log = logging.getLogger(__name__)


class SnapshotMissing(Exception):
    """A file that cannot be kept here, or that a source does not give. One sentence."""


class NodeFolder:
    """The folder of one node of one run, below the node's directory."""

    def __init__(self, directory: Path, below: PurePosixPath) -> None:
        """`below` the node's `directory`: see `place_of`."""
        self._directory = directory
        self.path = directory / below

    def make(self, folder: Path) -> None:
        """Make `folder`, this one or one in it, with what is missing above it, for this user alone.

        Raises:
            OSError: it cannot be made, or is not this user's alone.
        """
        for _ in range(_MAKE_ATTEMPTS - 1):
            with contextlib.suppress(FileNotFoundError):
                # A neighbour that leaves may remove an empty folder between two lines: then once
                # more.
                return self._make_once(folder)
        self._make_once(folder)

    def _make_once(self, folder: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        made = self._directory
        for part in folder.relative_to(self._directory).parts:
            made /= part
            with contextlib.suppress(FileExistsError):
                made.mkdir(mode=0o700)
                sync_folder(made.parent)
            status = made.lstat()  # of a link itself: one could lead anywhere
            if (
                not stat.S_ISDIR(status.st_mode)
                or status.st_uid != os.getuid()
                or status.st_mode & 0o077
            ):
                raise PermissionError(errno.EPERM, "not a folder of this user alone", str(made))

    def remove_empty(self, folder: Path) -> None:
        """Remove `folder` and those above it that are empty, up to the node's directory."""
        while folder != self._directory:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return
            folder = folder.parent


def place_of(run_directory: Path, node: str) -> PurePosixPath:
    """Where, below a node's directory, the files of `node` of a run lie: the run's mark as file
    names."""
    mark = hashlib.sha256(os.fsencode(mark_of(run_directory, ""))).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", run_directory.resolve().name)[:64]
    return PurePosixPath(f"opt_train-{os.getuid()}", f"{readable}-{mark}", node)


def directory_of(configured: str) -> Path:
    """`checkpoint.node_directory`; empty: the folder of temporary files."""
    return Path(configured or tempfile.gettempdir()).expanduser().resolve()


def check_names(path: str, name: str) -> None:
    """Raises `SnapshotMissing` if these cannot be a checkpoint that agents keep and a file in
    it."""
    if not PATH_FORM.fullmatch(path):
        raise SnapshotMissing(f"{path!r} is no checkpoint that agents hold")
    if not is_name(name):
        raise SnapshotMissing(f"{name!r} is no name of a checkpoint's file")


def is_name(name: str) -> bool:
    """Whether a file of a checkpoint may have this name."""
    return NAME_FORM.fullmatch(name) is not None and name != MANIFEST and not name.endswith(PARTIAL)


def remove_file(file: Path) -> None:
    """Remove a file, if it is there; one that cannot be removed is logged."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.error("%s cannot be removed: %s", file, error.strerror)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all in it; links in it, not what they name."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.error("%s cannot be removed: %s", folder, error.strerror)
