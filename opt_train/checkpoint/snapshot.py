"""A rank's own part of the state in memory that can outlive it: files in memory, which the node's
agent opens too.

No rank waits for another here, and none knows whether the others have done: whoever leads the run
judges that. The parts are not shared out among replicas, as those of a save are, so that each rank
can be restored from its own file alone; all ranks' files together are a checkpoint that torch's
reader loads on any layout.
"""

import contextlib
import hashlib
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from opt_train.checkpoint.manifest import STATE, CheckpointError, own_file_name, state_content
from opt_train.checkpoint.parts import OwnPart, own_parts
from opt_train.checkpoint.safetensors_file import header_of, sharding_metadata
from opt_train.checkpoint.tensors import Restorable
from opt_train.protocol.facts import MemoryFile

PARTS = "parts"
"""The key of `state.json` under which a snapshot says `OWN`: each rank's file holds all that the
rank holds."""
OWN = "own"
NO_STEP = -1
"""Of a slot without a whole snapshot."""


class Snapshot:
    """One snapshot under way."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seconds = 0.0
        """From the beginning to the end, as soon as it has ended."""
        self._began = time.monotonic()
        self._copied = Event()
        self._done: Future[tuple[MemoryFile, ...]] = Future()
        self._ended = Event()

    def wait_copied(self) -> None:
        """Return when the tensors may change again, whether or not they could be copied."""
        self._copied.wait()

    def wait(self, seconds: float) -> bool:
        """Whether the snapshot is whole and hashed, or has failed, within `seconds`."""
        with contextlib.suppress(TimeoutError):
            self._done.exception(timeout=seconds)
        return self._done.done()

    def files(self) -> tuple[MemoryFile, ...]:
        """This rank's files; waits for the end.

        Raises:
            CheckpointError: there is no snapshot: no memory could be had for it. Training can go
                on.
        """
        return self._done.result()


class Snapshots:
    """The newest snapshots of a rank, in a ring of files in memory.

    There is one more file than snapshots to keep: that many are whole while another one is copied.
    The files are used again and again, as pages that have not been touched before make a copy take
    twice its time and more. So whoever holds a descriptor of an older snapshot finds another one in
    it, and by its hash.
    """

    def __init__(self, rank: int, keep: int, device: torch.device) -> None:
        """Make no file yet.

        Args:
            keep: snapshots that stay whole meanwhile; memory is used for one more.
        """
        self._name = own_file_name(rank)
        self._device = device
        self._slots = [_Slot() for _ in range(keep + 1)]
        self._newest: Snapshot | None = None
        # Beside the device's work, and not behind what is queued. (Tested in tests/gpu, which has
        # not run on one yet.)
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def begin(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None
    ) -> Snapshot:
        """Begin to copy `tensors`, which nobody may change before `Snapshot.wait_copied` has
        returned.

        Waits for the snapshot before, if that has not ended.

        Args:
            state: what is not a tensor; given by rank 0, whose files then include `state.json`.
        """
        if self._newest is not None:
            self._newest._ended.wait()
        if self._device.type != "cpu":
            # As `Staging.start` does: the copies do not wait for the update that was queued last.
            # They go into plain memory, a tensor at a time; memory registered with the device
            # (cudaHostRegister) has not been tried.
            torch.accelerator.current_stream(self._device).synchronize()
        self._newest = snapshot = Snapshot(step)
        parts = own_parts(tensors)
        # No daemon: memory does not stand still, and torch aborts a process that ends while a
        # thread of it computes.
        Thread(
            target=self._run, args=(snapshot, parts, state), name=f"snapshot of step {step}"
        ).start()
        return snapshot

    def _run(
        self, snapshot: Snapshot, parts: Mapping[str, OwnPart], state: Mapping[str, Any] | None
    ) -> None:
        slot = self._oldest()
        try:
            slot.step = NO_STEP
            try:
                size = self._copy(parts, slot)
            finally:
                snapshot._copied.set()
            files = [slot.shard_file(self._name)]
            if state is not None:
                files.append(slot.state_file(state))
            slot.step = snapshot.step
            snapshot.seconds = time.monotonic() - snapshot._began
            snapshot._done.set_result(tuple(files))
            with contextlib.suppress(OSError, MemoryError):  # the next snapshot will say so
                self._oldest().make(size, touch=True)
        except (OSError, MemoryError) as error:
            slot.give_up()
            reason = (
                f"{error.strerror}" if isinstance(error, OSError) else str(error) or "no memory"
            )
            snapshot._done.set_exception(
                CheckpointError(f"no memory for the snapshot of step {snapshot.step}: {reason}")
            )
        except BaseException as error:  # whoever asks for the files gets it
            snapshot._done.set_exception(error)
        finally:
            snapshot._ended.set()

    def has(self, step: int) -> bool:
        """Whether the snapshot of `step` is here, whole."""
        return any(slot.step == step for slot in self._slots)

    def put_back(self, step: int, into: Restorable) -> None:
        """Make the snapshot of `step`, which is here, the state of `into`, and forget those behind
        it. None may be under way."""
        slot = next(slot for slot in self._slots if slot.step == step)
        tensors = into.tensors()
        with torch.no_grad():
            for local, there in slot.views(own_parts(tensors)):
                local.copy_(there)
        into.put_back(tensors)
        # Their steps come again, on another branch; what was before stays to go back to.
        for other in self._slots:
            if other.step > step:
                other.step = NO_STEP

    def _oldest(self) -> "_Slot":
        """The slot that the next snapshot goes into."""
        return min(self._slots, key=lambda slot: slot.step)

    def _copy(self, parts: Mapping[str, OwnPart], slot: "_Slot") -> int:
        """Make the slot's file that of `parts`; its size."""
        names = _in_order(parts)
        metadata = sharding_metadata({name: parts[name].offsets for name in names})
        described = ((name, parts[name].local.dtype, parts[name].local.shape) for name in names)
        header = header_of(described, metadata)
        size = len(header) + sum(
            part.local.numel() * part.local.element_size() for part in parts.values()
        )
        mapped = slot.make(size)
        mapped[: len(header)] = header
        slot.tensors_at = len(header)
        with torch.no_grad(), self._stream or contextlib.nullcontext():
            for local, there in slot.views(parts):
                there.copy_(local)
        return size


def _in_order(parts: Mapping[str, OwnPart]) -> list[str]:
    """The names as their tensors lie in a file: the widest first, so that each begins at a multiple
    of its width."""
    return sorted(parts, key=lambda name: (-parts[name].local.element_size(), name))


class _Slot:
    """The two files of one snapshot: the rank's tensors, mapped and never made anew, and what is no
    tensor."""

    def __init__(self) -> None:
        self.step = NO_STEP
        """Of the snapshot that is here, whole."""
        self.tensors_at = 0
        """Bytes in front of the first tensor."""
        self._shard_fd = self._state_fd = -1
        self._mapped: mmap.mmap | None = None

    def views(self, parts: Mapping[str, OwnPart]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each part, which all lie here: its own tensor, and the one in this slot's memory."""
        at = self.tensors_at
        for name in _in_order(parts):
            local = parts[name].local
            if count := local.numel():
                there = torch.frombuffer(self._mapped, dtype=local.dtype, count=count, offset=at)
                yield local, there.view(local.shape)
                at += count * local.element_size()

    def make(self, size: int, *, touch: bool = False) -> mmap.mmap:
        """The file of tensors, of `size` bytes.

        Args:
            touch: have all its pages mapped, if they are new.

        Raises:
            OSError, MemoryError: no memory can be had.
        """
        if self._mapped is not None and len(self._mapped) == size:
            return self._mapped
        self.give_up()
        self._shard_fd = os.memfd_create("snapshot", os.MFD_CLOEXEC)
        # Before anything is written: a page that cannot be had is then an error, and not a signal
        # that kills.
        os.posix_fallocate(self._shard_fd, 0, size)
        self._mapped = mmap.mmap(self._shard_fd, size)
        if touch:
            torch.frombuffer(self._mapped, dtype=torch.uint8)[:: mmap.PAGESIZE].zero_()
        return self._mapped

    def shard_file(self, name: str) -> MemoryFile:
        """The file of tensors as it is now."""
        assert self._mapped is not None
        sha256 = hashlib.sha256(self._mapped).hexdigest()
        return MemoryFile(name, len(self._mapped), sha256, self._shard_fd)

    def state_file(self, state: Mapping[str, Any]) -> MemoryFile:
        """Make the other file hold `state`, the same bytes as `save` writes.

        Raises:
            OSError: no memory can be had.
        """
        content = state_content(state)
        if self._state_fd < 0:
            self._state_fd = os.memfd_create("snapshot state", os.MFD_CLOEXEC)
        os.ftruncate(self._state_fd, 0)
        written = os.pwrite(self._state_fd, content, 0)
        if written != len(content):
            raise MemoryError("no memory for the state")
        return MemoryFile(STATE, len(content), hashlib.sha256(content).hexdigest(), self._state_fd)

    def give_up(self) -> None:
        """Hold no memory any more."""
        self.step = NO_STEP
        self._mapped = None  # unmapped when the last tensor that looks into it is gone
        for fd in (self._shard_fd, self._state_fd):
            if fd >= 0:
                os.close(fd)
        self._shard_fd = self._state_fd = -1
