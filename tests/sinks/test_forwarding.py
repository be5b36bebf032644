"""The real wandb, offline, and the real TensorBoard: what they wrote is read back and compared with
the metrics."""

import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opt_logbook.record.metrics import MetricsWriter
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.run_config import RunConfig, to_json
from opt_train.sinks.config import SinksConfig

LOSSES = {1: 4.5, 2: 4.25, 3: math.nan, 4: 4.125}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(tmp_path / "toy")
    found.path.mkdir()
    found.config_json.write_text(
        to_json(RunConfig(name="toy", sinks=SinksConfig(wandb_project="project")))
    )
    write(found, "1.00", LOSSES)
    return found


def write(run: RunDirectory, attempt: str, losses: dict[int, float]) -> None:
    with MetricsWriter(run) as writer:
        for step, loss in losses.items():
            line = {
                "step": step,
                "time": 1e9 + step,
                "loss": loss,
                "mfu": None,
                "overflow": step == 3,
            }
            writer.append(
                attempt, line | {"layer_grad_norms": [loss, step, math.inf] if step == 4 else None}
            )


def forward(run: RunDirectory, sink: str) -> None:
    """All there is, as by hand."""
    command = [sys.executable, "-P", "-m", "opt_train.sinks", str(run.path), sink]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=run.path.parent,
    )
    assert done.returncode == 0, done.stderr


def position(run: RunDirectory, sink: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((run.path / "sinks" / f"{sink}.json").read_text())
    return found


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


# TensorBoard --------------------------------------------------------------------------------------


def scalars(run: RunDirectory, tag: str) -> dict[int, float]:
    """What TensorBoard shows: of a step, what a later session said."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(run.path / "sinks" / "tensorboard"))
    accumulator.Reload()
    found = accumulator.Scalars(tag)
    steps = [event.step for event in found]
    assert steps == sorted(set(steps)), "a step that was trained twice is shown once"
    assert all(event.wall_time == 1e9 + event.step for event in found)
    return {event.step: event.value for event in found}


def test_tensorboard_shows_the_metrics_and_a_rollback_replaces_what_it_took_back(
    run: RunDirectory,
) -> None:
    pytest.importorskip("tensorboard")
    forward(run, "tensorboard")
    shown = scalars(run, "loss")
    assert shown.keys() == LOSSES.keys()
    assert all(same(shown[step], loss) for step, loss in LOSSES.items())
    assert scalars(run, "overflow") == {1: 0.0, 2: 0.0, 3: 1.0, 4: 0.0}
    assert scalars(run, "layer_grad_norms/layer_0") == {4: 4.0}
    assert scalars(run, "layer_grad_norms/final") == {4: math.inf}

    write(run, "1.01", {3: 4.0, 4: 3.5, 5: 3.25})
    forward(run, "tensorboard")
    assert scalars(run, "loss") == {1: 4.5, 2: 4.25, 3: 4.0, 4: 3.5, 5: 3.25}
    assert position(run, "tensorboard") == {"attempt": "1.01", "step": 5, "sent": 7}

    (
        run.path / "sinks" / "tensorboard.json"
    ).unlink()  # the sink was killed before it could note where it stood
    forward(run, "tensorboard")
    assert scalars(run, "loss") == {1: 4.5, 2: 4.25, 3: 4.0, 4: 3.5, 5: 3.25}


# W&B ----------------------------------------------------------------------------------------------


def records(path: Path) -> Iterator[bytes]:
    """The payloads of a `.wandb` file: 7 bytes of header, then LevelDB's log format (32 KiB
    blocks)."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def history(run: RunDirectory) -> tuple[set[str], list[dict[str, object]]]:
    """Ids of the W&B runs in the directory, and their history lines in order."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    ids, lines = set(), []
    for path in sorted((run.path / "sinks" / "wandb").glob("offline-run-*/run-*.wandb")):
        for payload in records(path):
            record = messages.Record.FromString(payload)
            if record.run.run_id:
                ids.add(record.run.run_id)
            if record.history.item:
                items = record.history.item
                lines.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return ids, lines


def test_wandb_gets_the_metrics_and_goes_on_with_the_same_run(run: RunDirectory) -> None:
    pytest.importorskip("wandb")
    forward(run, "wandb")
    write(run, "1.01", {3: 4.0, 4: 3.5})
    forward(run, "wandb")
    ids, lines = history(run)
    assert ids == {(run.path / "sinks" / "wandb-run-id").read_text().strip()}
    assert [(line["attempt"], line["step"]) for line in lines] == [
        *(("1.00", step) for step in LOSSES),
        ("1.01", 3),
        ("1.01", 4),
    ]
    assert [line["_step"] for line in lines] == list(range(6)), "W&B drops what goes back"
    expected = [*LOSSES.values(), 4.0, 3.5]
    assert all(
        same(float(str(line["loss"])), loss) for line, loss in zip(lines, expected, strict=True)
    )
    assert [line.get("layer_grad_norms/layer_0") for line in lines] == [
        None,
        None,
        None,
        4,
        None,
        4,
    ]
    assert position(run, "wandb") == {"attempt": "1.01", "step": 4, "sent": 6}
    assert not (run.path.parent / "wandb").exists(), "it keeps to the run directory"
