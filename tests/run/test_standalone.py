"""What a lone rank's record-keeper must not do: train beside others, trust a path, or call done
what is lost."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from opt_logbook.record import metrics
from opt_logbook.record.events import CheckpointCommitted, Entry, OrderEnded, OrderGiven
from opt_logbook.record.journal import Journal, read
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli import train as cli_train
from opt_train.config.compose import compose
from opt_train.config.run_config import RunConfig
from opt_train.host.processes import stat_of
from opt_train.protocol.exits import DONE, NO, PERSON_MUST_DECIDE, BadInput
from opt_train.protocol.facts import ExitNotice, Metrics, SavedFile, ShardsSaved, Validation
from opt_train.protocol.orders import LedgerEntry
from opt_train.protocol.standalone import StandaloneBegin
from opt_train.run import lineage
from opt_train.run.ledger import from_json
from opt_train.run.standalone import StandaloneRun
from opt_train.train.fact_pipe import log_line
from tests import command
from tests.train.lr_factor import LrFactor

SMALL = (*command.SMALL, "checkpoint.keep=2")


@pytest.fixture
def config(workplace: Path) -> RunConfig:
    return compose(SMALL)


def a_standalone_run(config: RunConfig) -> tuple[StandaloneRun, RunDirectory]:
    run, resolved = lineage.resolve(config)
    return StandaloneRun(
        run, resolved, lineage.classify_start(run, resolved, asked_for_lineage=False), log_line
    ), run


def save(
    standalone: StandaloneRun, run: RunDirectory, attempt: str, step: int, missing_bytes: int = 0
) -> None:
    """What a rank writes and says when it saves."""
    folder = run.checkpoint(attempt, step)
    folder.mkdir(parents=True)
    files = []
    for name, content in (("state.json", b"{}"), ("model.safetensors", b"weights")):
        (folder / name).write_bytes(content)
        files.append(
            SavedFile(name, len(content) + missing_bytes, hashlib.sha256(content).hexdigest())
        )
    standalone.record(0, ShardsSaved(step, str(folder), tuple(files), 0.1))


def test_ranks_of_a_dead_supervisor_are_not_joined_by_a_lone_one(config: RunConfig) -> None:
    """Its lock is free and its ranks train on until their agents' lease is over: two generations at
    once."""
    standalone, run = a_standalone_run(config)
    (run.nodes / "node-1").mkdir(parents=True)
    me = stat_of(os.getpid())
    assert me is not None
    registration = {"node": "node-1", "pid": os.getpid(), "start_ticks": me.start_ticks}
    (run.nodes / "node-1" / "agent.json").write_text(json.dumps(registration))
    with pytest.raises(BadInput, match=r"node-1.*still live.*opt-train run"):
        standalone.open()
    standalone.close()
    assert not run.journal.exists()

    (run.nodes / "node-1" / "agent.json").write_text(json.dumps(registration | {"start_ticks": 1}))
    assert standalone.open().attempt == "1.00", "an agent that is gone keeps nobody out"
    standalone.close()


def test_a_path_in_the_journal_does_not_lead_retirement_out_of_the_run(
    config: RunConfig, workplace: Path
) -> None:
    precious = workplace / "precious" / "folder"
    precious.mkdir(parents=True)
    (precious / "thesis.txt").write_text("years of work")
    standalone, run = a_standalone_run(config)
    standalone.open()
    save(standalone, run, "1.00", 4)
    standalone.close()
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        planted = CheckpointCommitted("../../precious/folder", "0" * 64, 1, 1, 0.1, healthy=True)
        journal.append(Entry(1.7e9, "1.00", 1, planted))

    standalone, run = a_standalone_run(config)
    assert standalone.open().checkpoint == str(run.checkpoint("1.00", 4))
    for step in (8, 12):
        save(standalone, run, "1.01", step)
    standalone.close()
    assert not run.checkpoint("1.00", 4).exists()
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_done_is_only_what_a_checkpoint_holds(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the last save: the run is not finished, says so, and trains the last steps
    again when asked."""

    def ranks(
        _config: RunConfig,
        open_run: Callable[[], object],
        _reject_checkpoint: object,
        record: Callable[[int, object], None],
    ) -> int:
        standalone = record.__self__  # type: ignore[attr-defined]  # StandaloneRun.record
        open_run()
        save(
            standalone,
            RunDirectory(Path(config.runs, config.name).absolute()),
            "1.00",
            12,
            missing_bytes=1,
        )
        record(0, ExitNotice(DONE, 12, "all 12 steps are done"))
        return DONE

    monkeypatch.setattr(cli_train, "train_standalone", ranks)
    assert cli_train.train(config) == NO
    run = RunDirectory(Path(config.runs, config.name))
    last = [entry.event for entry in read(run.journal).entries][-2:]
    assert [event.kind for event in last] == ["save_abandoned", "attempt_ended"]
    assert last[1].outcome == "failed"


def test_a_damaged_journal_is_a_persons_decision_alone_too(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    standalone, run = a_standalone_run(config)
    standalone.open()
    standalone.close()
    content = run.journal.read_bytes()
    run.journal.write_bytes(content.replace(b"started alone", b"started Alone"))
    begun = []

    def ranks(_config: RunConfig, open_run: Callable[[], object], *_rest: object) -> int:
        begun.append(open_run())
        return DONE

    monkeypatch.setattr(cli_train, "train_standalone", ranks)
    assert cli_train.train(config) == PERSON_MUST_DECIDE
    assert "is damaged" in capsys.readouterr().out
    assert begun == []
    assert cli_train.train(config) == DONE, "to start again is to say yes"
    assert len(begun) == 1


def test_a_run_directory_that_cannot_be_used_is_a_sentence(config: RunConfig) -> None:
    standalone, run = a_standalone_run(config)
    run.lock.mkdir(parents=True)
    with pytest.raises(BadInput, match=r"journal\.lock.*mend it"):
        standalone.open()
    standalone.close()


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, r"no RANK and no MASTER_ADDR .* beside WORLD_SIZE .*torchrun"),
        ({"RANK": "0"}, r"no WORLD_SIZE and no MASTER_ADDR .* beside RANK .*unset it"),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "3",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
            },
            "WORLD_SIZE=3 is no multiple of LOCAL_WORLD_SIZE=2; start as many ranks on each node",
        ),
    ],
)
def test_an_environment_that_is_not_torchruns_is_a_sentence(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sentence: str
) -> None:
    """A variable left behind by another job made a traceback, and an attempt of two ranks in the
    journal."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=sentence):
        cli_train.train(config)
    assert not Path(config.runs, config.name).exists()


def test_metrics_that_cannot_be_written_are_reported_once_and_end_nothing(
    config: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    standalone, run = a_standalone_run(config)
    standalone.open()
    run.metrics.write_text("a file where a folder should be")
    for step in (1, 2):
        standalone.record(0, Metrics({"step": step, "loss": 5.0, "tokens": 128 * step}))
    reported = [line for line in capfd.readouterr().out.splitlines() if "metrics" in line]
    assert reported == ["step 1: its metrics could not be written (File exists); training goes on"]
    run.metrics.unlink()
    standalone.record(0, Metrics({"step": 3, "loss": 4.0, "tokens": 384}))
    standalone.close()
    assert [line["step"] for line in metrics.read(run).lines] == [3]


def test_a_journal_that_takes_no_more_is_a_sentence(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not hold, no later start would know; so training ends, and not with a
    traceback."""
    standalone, run = a_standalone_run(config)
    standalone.open()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(BadInput, match=r"journal\.jsonl: No space left on device; make room"):
            standalone.record(0, Validation("validation", 4, 2.0, 100))
    standalone.close()
    assert read(run.journal).damaged == ()


def test_lasting_orders_of_a_supervised_attempt_stay_in_force(config: RunConfig) -> None:
    """A learning rate that somebody lowered must not rise because nobody supervises any more."""
    standalone, run = a_standalone_run(config)
    assert standalone.open().ledger == ()
    standalone.close()
    halved = LrFactor(1, "a spike", 0.5)
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        for event in (
            OrderGiven(1, "test_lr_factor", "a spike", {"factor": 0.5}),
            OrderEnded(1, "obeyed"),
        ):
            journal.append(Entry(1.7e9, "1.00", 7, event))

    standalone, run = a_standalone_run(config)
    begin = standalone.open()
    standalone.close()
    assert begin.order_number == 1
    # As every rank but the first gets it.
    received = StandaloneBegin(**json.loads(json.dumps(asdict(begin))))
    assert from_json(received.ledger) == (LedgerEntry(7, halved),)
