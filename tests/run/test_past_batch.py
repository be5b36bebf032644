"""The batch of a step is the one that it was trained on, under what had been ordered by then."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from opt_logbook.record.events import Entry, Event, LineageOpened, OrderEnded, RunCreated
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.run_config import RunConfig, to_json
from opt_train.data.batches import Batches
from opt_train.data.manifest import DatasetManifest
from opt_train.data.order import Cursor
from opt_train.data.token_stream import open_split
from opt_train.protocol.exits import BadInput
from opt_train.protocol.orders import RollBack, SkipSamples
from opt_train.run.past.batch import batch_of
from opt_train.supervisor.rules.orders import order_given
from tests.run.test_taken_ledger import attempt
from tests.train.rig import tiny_config

BACK = RollBack(2, "it climbs", 20, "1.01", 2, (SkipSamples(3, "", 40),))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Passed 24 samples over behind step 10, and went back from step 35 to 20, to pass 40 more."""
    run, config = RunDirectory(tmp_path / "run"), tiny_config(tmp_path)
    run.path.mkdir()
    run.config_json.write_text(to_json(config))
    data = DatasetManifest.read(Path(config.data.directory))
    lines: tuple[tuple[str, int | None, Event], ...] = (
        ("", None, RunCreated("run", 7, "tiny", 1, 1, 1, data_fingerprint=data.fingerprint)),
        ("", None, LineageOpened(1, "")),
        ("1.00", 0, attempt("1.00", 1)),
        ("1.00", 9, order_given(SkipSamples(1, "", 24))),
        ("1.00", 10, OrderEnded(1, "obeyed")),
        ("1.00", 35, order_given(BACK)),
        ("1.01", 20, attempt("1.01", 2, "1.00")),
        ("1.01", 20, OrderEnded(2, "obeyed")),
    )
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        for name, step, event in lines:
            journal.append(Entry(1.0, name, step, event))
    return run


@pytest.mark.parametrize(
    ("name", "step", "found", "position"),
    [
        ("", 1, "1.00", 0),
        ("", 10, "1.00", 72),
        ("", 11, "1.00", 80 + 24),
        ("", 20, "1.00", 152 + 24),
        ("", 21, "1.01", 160 + 24 + 40),
        ("1.00", 21, "1.00", 160 + 24),
        ("1.00", 35, "1.00", 272 + 24),
    ],
)
def test_it_is_where_the_attempt_stood_in_the_data(
    run: RunDirectory, tmp_path: Path, name: str, step: int, found: str, position: int
) -> None:
    batch = batch_of(run, step, name)
    assert (batch.attempt, batch.position) == (found, position)
    config: RunConfig = batch.config
    stream = open_split(batch.data, "train", verify=False)
    batches = Batches(stream, 64, config.train.global_batch, config.seed)
    read = batches.at(Cursor(position), data_rank=0, data_world=1, micro_batch=8)
    expected = torch.cat([part.tokens for part in read])
    rows = [stream.read(sample * 64, 64).tolist() for sample in batch.samples]
    assert rows == expected.tolist()


def test_what_is_not_there_is_named(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no attempt 1\.07; it has 1\.00, 1\.01"):
        batch_of(run, 5, "1.07")
    with pytest.raises(BadInput, match=r"attempt 1\.01 began behind step 20: its first is 21"):
        batch_of(run, 20, "1.01")
    with pytest.raises(BadInput, match="step 0 is none"):
        batch_of(run, 0)
    with pytest.raises(BadInput, match="is no run directory, or has not begun"):
        batch_of(RunDirectory(tmp_path / "corpus"), 1)
    shutil.move(tmp_path / "prepared", tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"prepared, the prepared data of .*run, is not there"):
        batch_of(run, 5)
    # Where somebody has moved it to, the run goes on with it, and so does this.
    config = tiny_config(tmp_path)
    moved = replace(config.data, directory=str(tmp_path / "elsewhere"))
    run.config_json.write_text(to_json(replace(config, data=moved)))
    assert batch_of(run, 5).data == tmp_path / "elsewhere"
