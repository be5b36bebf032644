"""Metrics into TensorBoard's event files, with TensorBoard's own writer: no torch, no
TensorFlow."""

from collections.abc import Mapping
from typing import Any

from opt_logbook.record.run_directory import RunDirectory
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from opt_train.sinks.config import SinksConfig
from opt_train.sinks.metrics_tail import MetricsLine


class TensorBoardSink:
    """One event file a process, all in `sinks/tensorboard`, which TensorBoard shows as one
    curve."""

    def __init__(
        self, run: RunDirectory, _config: SinksConfig, _configuration: Mapping[str, Any]
    ) -> None:
        folder = run.path / "sinks" / "tensorboard"
        run.make_folder(folder)
        self._writer = EventFileWriter(str(folder))
        self._attempt = ""

    def send(self, line: MetricsLine, number: int) -> None:
        """Queue one step's scalars. `number`: how many lines were sent before it in the run's
        life."""
        if line.attempt != self._attempt:
            # A session begins: TensorBoard drops what it has from this step on, as the run itself
            # did.
            self._attempt = line.attempt
            began = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=line.time, step=line.step, session_log=began))
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in line.values.items()]
        self._writer.add_event(
            Event(wall_time=line.time, step=line.step, summary=Summary(value=scalars))
        )

    def flush(self) -> None:
        """Wait until what was sent is in the file."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
