"""What a rank's process writes: a file on the node's own disk, which a thread copies into the run
directory.

So a shared file system that stands still or is full stops no rank in the middle of a step, and what
a rank wrote last can be told as evidence at once. The file has no name: it is gone with the
processes that have it open.
"""

import contextlib
import fcntl
import logging
import os
import tempfile
import threading
import weakref
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.checkpoint.held_folder import FolderReplacedError, HeldFolder
from opt_train.protocol.facts import LogLine

TAIL_LINES = 20
MAX_LINE_BYTES = 600
COPY_SECONDS = 0.2
"""How far a copy lies behind, where nothing is wrong."""
_TAIL_BYTES = 64 * 1024
_BLOCK_BYTES = 1 << 20

log = logging.getLogger(__name__)


class RankLog:
    """One process's standard output and error. Its file is closed with the last reference to
    this."""

    def __init__(self) -> None:
        """Raises OSError if the folder of temporary files takes none."""
        with tempfile.TemporaryFile(prefix="opt-train-rank-", buffering=0) as file:
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        # Who opens /dev/stderr anew must not write over the beginning.
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_APPEND)

    def fileno(self) -> int:
        """For the process to write to."""
        return self._fd

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return os.fstat(self._fd).st_size

    def read(self, begin: int, count: int) -> bytes:
        """At most `count` bytes from `begin`."""
        return os.pread(self._fd, count, begin)

    def tail(self, name: str, after_byte: int = 0, lines: int = TAIL_LINES) -> tuple[LogLine, ...]:
        """The last non-empty `lines`, as far as they begin at or after `after_byte`, with their
        true numbers.

        Each is cut at `MAX_LINE_BYTES`; what is not UTF-8 is replaced. `name` is the file's that
        the copy goes to.
        """
        end = self.size
        begin = max(after_byte, end - _TAIL_BYTES)
        number = 1 + self._newlines(begin)
        numbered = [
            LogLine(
                name, number + index, raw[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip("\r")
            )
            for index, raw in enumerate(self.read(begin, end - begin).split(b"\n"))
            if raw.strip()
        ]
        if begin > after_byte and numbered and numbered[0].line == number:
            del numbered[0]  # the window begins in the middle of this line
        return tuple(numbered[-lines:])

    def _newlines(self, end: int) -> int:
        """Newlines in the first `end` bytes."""
        count = position = 0
        while position < end and (block := self.read(position, min(_BLOCK_BYTES, end - position))):
            count += block.count(b"\n")
            position += len(block)
        return count


class _Copy:
    """A log on its way into the run directory."""

    def __init__(self, source: RankLog, path: Path) -> None:
        self.source, self.path = source, path
        self.is_last = threading.Event()
        """Nobody writes to the source any more."""
        self.copied = 0
        self._into = -1

    def advance(self, run: HeldFolder) -> None:
        """Copy what is there. Raises OSError; what was copied by then stays so."""
        while content := memoryview(self.source.read(self.copied, _BLOCK_BYTES)):
            if self._into < 0:
                self._into = run.open_to_append(self.path)
            self.copied += os.write(self._into, content)

    def close(self) -> None:
        """Close the copy; the next `advance` opens it anew, as the old handle may have gone
        stale."""
        if self._into >= 0:
            with contextlib.suppress(OSError):
                os.close(self._into)
            self._into = -1


class LogCopies:
    """The thread that copies the logs of a node's ranks. What cannot be written is tried again
    until it can.

    A daemon: one that hangs in a dead file system keeps nobody from leaving.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = HeldFolder(run.path)
        self._lock = threading.Lock()
        self._copies: dict[RankLog, _Copy] = {}
        self._poke = threading.Event()
        self._closing = False
        self._trouble = ""
        self._thread = threading.Thread(target=self._serve, name="log copies", daemon=True)

    def begin(self, source: RankLog, path: Path) -> None:
        """Copy `source`, from its first byte on, to `path` in the run directory."""
        with self._lock:
            self._copies[source] = _Copy(source, path)
            if not self._thread.is_alive():
                self._thread.start()

    def end(self, source: RankLog) -> None:
        """Nobody writes to `source` any more: copy the rest, if it is copied at all, and forget
        it."""
        with self._lock:
            copy = self._copies.get(source)
        if copy is not None:
            copy.is_last.set()
            self._poke.set()

    def close(self, seconds: float) -> None:
        """Wait for what is left to be copied, `seconds` at most."""
        self._closing = True
        self._poke.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _serve(self) -> None:
        while not self._closing or self._copies:
            self._poke.wait(COPY_SECONDS)
            self._poke.clear()
            with self._lock:
                copies = list(self._copies.values())
            for copy in copies:
                self._serve_one(copy)

    def _serve_one(self, copy: _Copy) -> None:
        is_last = copy.is_last.is_set()  # asked first: what is written until then is copied now
        try:
            copy.advance(self._run)
        except OSError as error:
            copy.close()
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.warning("%s lies behind: %s", copy.path, error)
            return
        except FolderReplacedError:
            is_last = True
        self._trouble = ""
        if is_last:
            with self._lock:
                del self._copies[copy.source]
            copy.close()
