"""A folder that is filled beside its final place and renamed there whole: a crash leaves no half
export."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from opt_train.checkpoint.durable_file import sync_folder
from opt_train.protocol.exits import BadInput


def check_free(folder: Path) -> None:
    """Check that nothing would be lost.

    Raises:
        BadInput: something is there already.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise BadInput(f"--to={folder} exists and is not empty; give another folder, or remove it")


@contextlib.contextmanager
def filled_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which it becomes at the end; after an error nothing of it is
    left.

    The caller fsyncs the files in it.

    Raises:
        BadInput: something is at `folder` already.
        OSError: the file system does not allow it; one about a file in the new folder names
            `folder`.
    """
    folder = Path(os.path.abspath(folder))
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside, not in /tmp: a rename is atomic within one file system only.
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        # mkdtemp makes 0700, which nobody else could read; a plain mkdir would have given this.
        partial.chmod(0o777 & ~_umask())
        for inner in [path for path in partial.rglob("*") if path.is_dir()]:
            sync_folder(inner)
        sync_folder(partial)
        # Again: filling takes long, and somebody may have put something there meanwhile.
        check_free(folder)
        partial.rename(folder)  # takes the place of an empty folder too
        sync_folder(folder.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename).is_relative_to(partial):
            error.filename = str(
                folder
            )  # the name that was asked for: the partial one is gone in a moment
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    # POSIX has no call that only reads it. The strict value stands while it is set: too few rights
    # for a moment, never too many.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
