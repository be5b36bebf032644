"""Replaces a file so that no reader ever sees half of it.

Theory of operation. A file that is written where it lies is empty or half there for a moment, and
for good if the process dies in that moment. So the content goes into a file beside it, and a rename
puts that in its place. Three promises are easily taken for one:

1. **Whole for readers.** rename(2) within one folder swaps the name in one step: who opens it sees
   the old file or the new one. This is all that a living machine needs, and kill -9 does not break
   it, since the page cache outlives the process.
2. **Whole after a crash of the machine.** The file system may write the rename before the content:
   after power loss the name may stand over an empty file. Only an fsync of the new file *before*
   the rename orders the two.
3. **There after a crash of the machine.** The rename itself lies in the folder: only an fsync of
   the folder *after* it makes it stay; else the old file may come back, whole.

What needs which:

| file | promise | because |
|---|---|---|
| chronicle, supervisor's address, an agent's registration | 1 | made anew by the next start |
| `journal.head` | 1, 2 | an older head is a weaker anchor, an empty one would look like damage |
| configuration of a run, messages of the inbox | 1, 2 | half of one must never be read |
| the journal's own name, manifests of checkpoints | 1, 2, 3 | somebody acts on their being there |

The third is `sync_folder`, called by those who need it. Checkpoints have their own code for this,
in `opt_train.checkpoint`, which does not know the logbook.

Over NFS the rename is one step on the server too, but a client whose reply was lost sends it again
and may get ENOENT for a rename that was done, and other clients may see the old file for as long as
they cache names (seconds). Whoever must know the newest reads the journal.
"""

import os
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Put `content` in the place of the file at `path`, whole or not at all.

    Args:
        durable: fsync the content before the rename, so that it is whole after power loss too.

    Raises:
        OSError: it could not be written or renamed; the file at `path` is as it was.
    """
    # Hidden, since folders are listed (the inbox, a chronicle's figures). With the process's
    # number, since two may replace one file at once: a supervisor that renders and a person who
    # does.
    partial = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with partial.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fdatasync(file.fileno())
        os.replace(partial, path)
    except OSError:
        # On a full disk even its own partial file is in the way.
        with suppress(OSError):
            partial.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: what was created, renamed or removed there stays so.

    Raises:
        OSError: the folder is not there, or its file system cannot.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
