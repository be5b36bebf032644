"""Saving beside training: the state is copied while the next step computes, and written while
others follow.

A step changes weights and moments in its update alone, so the copy has the whole forward and
backward pass to finish; only an update that comes sooner waits for it.
"""

import contextlib
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from opt_train.checkpoint.all_or_none import all_or_none
from opt_train.checkpoint.held_folder import HeldFolder
from opt_train.checkpoint.save import save
from opt_train.protocol.facts import SavedFile


class Staging:
    """Copies of a rank's state in host memory, kept from one save to the next: pinned where the
    state is on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[str, torch.Tensor] = {}
        # Beside the device's work, and not behind what is queued. (Tested in tests/gpu, which has
        # not run on one yet.)
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def start(self, tensors: Mapping[str, torch.Tensor]) -> Future[dict[str, torch.Tensor]]:
        """Begin to copy `tensors`, which nobody may change before the future is done.

        The copies are named and spread as the tensors are, and belong to whoever waits for them
        until the next start.
        """
        if self._stream is not None:
            # The copies run on a stream of their own, which does not wait for the update that was
            # queued last.
            torch.accelerator.current_stream(self._device).synchronize()
        copied: Future[dict[str, torch.Tensor]] = Future()
        # No daemon: memory does not stand still, and torch aborts a process that ends while a
        # thread of it computes.
        Thread(target=self._run, args=(dict(tensors), copied), name="copy of the state").start()
        return copied

    def _run(
        self, tensors: Mapping[str, torch.Tensor], copied: Future[dict[str, torch.Tensor]]
    ) -> None:
        try:
            copied.set_result(self._copy(tensors))
        except BaseException as error:  # whoever asks for the copies gets it
            self._copies.clear()
            copied.set_exception(error)

    def _copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        spread: dict[str, torch.Tensor] = {}
        with torch.no_grad(), self._stream or contextlib.nullcontext():
            for name, tensor in tensors.items():
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                copy = self._copies.get(name)
                if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                    pinned = self._stream is not None
                    copy = self._copies[name] = torch.empty(
                        local.shape, dtype=local.dtype, pin_memory=pinned
                    )
                copy.copy_(local, non_blocking=True)
                if isinstance(tensor, DTensor):
                    # Whoever plans a save asks where parts belong, and not which device they are
                    # on.
                    make: Any = DTensor  # torch does not type its constructor
                    spread[name] = make(copy, tensor._spec, requires_grad=False)
                else:
                    spread[name] = copy
            if self._stream is not None:
                self._stream.synchronize()
        return spread


class BackgroundSave:
    """One save under way. All ranks begin it at the same step and end it at the same step."""

    def __init__(
        self,
        step: int,
        staging: Staging,
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        folder: Path,
        process_group: dist.ProcessGroup,
        run_folder: HeldFolder | None = None,
    ) -> None:
        """Begin to copy and then to write.

        Args:
            process_group: gloo, and nobody else's while this goes on.

        See `opt_train.checkpoint.save.save` for the others.
        """
        self.step = step
        self.folder = folder
        self.written = (0, 0)
        """This rank's durable and expected bytes."""
        self.seconds = 0.0
        """From the beginning to the end, as soon as it has ended."""
        self._began = time.monotonic()
        self._copied = staging.start(tensors)
        self._done: Future[tuple[SavedFile, ...]] = Future()
        # A daemon: a file system that stands still must not keep a process alive that has something
        # else to say.
        Thread(
            target=self._run,
            args=(state, process_group, run_folder),
            name=f"save of step {step}",
            daemon=True,
        ).start()

    def _run(
        self,
        state: Mapping[str, Any],
        process_group: dist.ProcessGroup,
        run_folder: HeldFolder | None,
    ) -> None:
        try:
            copies: list[dict[str, torch.Tensor]] = []
            what = f"{self.folder} was not saved: the state was not copied"
            all_or_none(lambda: copies.append(self._copied.result()), process_group, what)
            files = save(
                copies[0],
                state,
                self.folder,
                run_folder=run_folder,
                process_group=process_group,
                progress=self._note_written,
            )
            self.seconds = time.monotonic() - self._began
            self._done.set_result(files)
        except BaseException as error:  # whoever asks for the files gets it
            self._done.set_exception(error)

    def _note_written(self, done: int, total: int) -> None:
        self.written = (done, total)

    def wait_copied(self) -> None:
        """Return when the tensors may change again, whether or not they could be copied."""
        wait([self._copied])

    def wait(self, seconds: float) -> bool:
        """Whether the save has ended, well or not, within `seconds`."""
        return bool(wait([self._done], timeout=seconds).done)

    def files(self) -> tuple[SavedFile, ...]:
        """This rank's files; waits for the end.

        Raises:
            CheckpointError: the save failed, here or on another rank; training can go on.
        """
        return self._done.result()
