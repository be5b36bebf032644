"""`status`, `stop`, `hold` and `resume` answer rightly wherever a run is in its life, with a
supervisor, without one, and before there ever was one."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from opt_logbook.record import inbox
from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    Entry,
    Event,
    FailureSeen,
    HoldBegan,
    IncidentDiagnosed,
    OrderGiven,
    RunCreated,
    RunFinished,
    RunHalted,
    RunStopped,
    SupervisorStarted,
    TrainingBegan,
)
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.run_config import RunConfig, to_json
from opt_train.parallel.config import PrecisionConfig
from opt_train.run.fold import fold
from opt_train.run.hold_requests import hold_in_force, journal_holds, why_held
from opt_train.run.state import RunState, Stage

BEGUN = (RunCreated("night", 0, "tiny", 1, 40, 1), SupervisorStarted(1, "n0", 17, "1", False))
TRAINS = (
    *BEGUN,
    AttemptStarted(1, "", "", "", ("n1", "n2"), ("n3",), 2, "first start"),
    TrainingBegan(1, 2.0),
)
FAILS = (*TRAINS, FailureSeen(1, 1, "n1", 0, "rank 0 ended", "exit"))
DIAGNOSED = IncidentDiagnosed(1, "killed", "unknown", "", 0.9, "n1", 0, (), "restart")
STAGES: dict[Stage, tuple[Event, ...]] = {
    Stage.NEW: (),
    Stage.ASSEMBLING: BEGUN,
    Stage.STARTING: TRAINS[:-1],
    Stage.TRAINING: TRAINS,
    Stage.STOPPING: (*TRAINS, OrderGiven(1, "save_and_stop", "ada")),
    Stage.FAILING: FAILS,
    Stage.RECOVERING: (*FAILS, DIAGNOSED, AttemptEnded(1, "failed")),
    Stage.FINISHING: (*TRAINS, AttemptEnded(1, "finished")),
    Stage.FINISHED: (*TRAINS, AttemptEnded(1, "finished"), RunFinished(3.0, 20.0, 40, 9.0)),
    Stage.STOPPED: (*TRAINS, AttemptEnded(1, "stopped"), RunStopped("ada", 7)),
    Stage.HALTED: (*FAILS, DIAGNOSED, AttemptEnded(1, "failed"), RunHalted("why?", "killed")),
}
"""What a journal has in each stage."""
AT_REST = (Stage.FINISHED, Stage.STOPPED, Stage.HALTED)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Stage], RunDirectory]:
    """Makes the run `night` in a stage, under `runs` of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGNAME", "ada")

    def make_run(stage: Stage) -> RunDirectory:
        run = RunDirectory(Path("runs", "night"))
        run.path.mkdir(parents=True)
        run.config_json.write_text(to_json(RunConfig(name="night")))
        with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
            for event in STAGES[stage]:
                attempt = "" if event in BEGUN else "1.00"
                journal.append(Entry(round(time.time(), 3), attempt, 0, event))
        return run

    return make_run


def state_of(run: RunDirectory) -> RunState:
    """What the journal folds to once somebody leads and has journalled what waits."""
    state = RunState()
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        for entry in journal.entries:
            state = fold(state, entry)
        journal_holds(
            run, state.hold, lambda event: journal.append(Entry(time.time(), "", None, event))
        )
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        for entry in journal.entries[len(STAGES[state.stage]) :]:
            state = fold(state, entry)
    return state


def test_the_journals_of_this_file_are_in_the_stages_they_stand_for(make) -> None:
    left = {Stage.REPLACING}  # as failing, to whoever looks from outside
    assert set(STAGES) | left == set(Stage)
    for stage, events in STAGES.items():
        state = RunState()
        for event in events:
            state = fold(state, Entry(1.0, "1.00", 0, event))
        assert state.stage is stage


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("verb", ["status", "stop", "hold", "resume"])
@pytest.mark.parametrize("led", [True, False])
def test_each_verb_answers_in_every_stage(make, say, stage: Stage, verb: str, led: bool) -> None:
    run = make(stage)
    if led:
        with Lock.acquire(run, leader=1):
            said = say(verb, "name=night")
    else:
        said = say(verb, "name=night")
    assert said.err == ""
    assert said.out.count("\n") == 1 or verb == "status"
    asked = verb == "status" or (verb == "hold" and stage is not Stage.FINISHED)
    asked |= verb == "stop" and led
    assert said.code == (0 if asked else 1), said.out
    kinds = [message["kind"] for message in inbox.peek(run)]
    assert kinds == ([verb] if asked and verb != "status" else [])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_trains_no_more_is_not_changed(make, say, stage: Stage) -> None:
    """Whoever asked would wait for a step that never comes."""
    run = make(stage)
    with Lock.acquire(run, leader=1):
        said = say("intervene", "name=night", "clip=0.5", "--why", "a look")
    ends = stage in (*AT_REST, Stage.STOPPING, Stage.FINISHING)
    assert said.code != 0 if ends else said.code == 0
    assert ("trains no step any more" in said.err) is ends
    assert [message["kind"] for message in inbox.peek(run)] == ([] if ends else ["intervene"])


def test_a_loss_scale_is_changed_only_of_a_run_that_has_one(make, say) -> None:
    run = make(Stage.TRAINING)
    asked = ("intervene", "name=night", "loss_scale=256", "embedding_gradient=0.5", "--why", "it")
    with Lock.acquire(run, leader=1):
        said = say(*asked)
        assert said.code != 0
        assert "night trains in bf16, which has no loss scale; leave loss_scale out" in said.err
        assert inbox.peek(run) == []
        fp16 = RunConfig(name="night", precision=PrecisionConfig(compute="fp16"))
        run.config_json.write_text(to_json(fp16))
        assert say(*asked).code == 0
    [message] = inbox.peek(run)
    assert message["changes"] == {"loss_scale": 256.0, "embedding_gradient": 0.5}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage is not Stage.FINISHED])
def test_a_hold_outlives_every_process_and_is_told_with_who_and_why(make, say, stage) -> None:
    run = make(stage)
    assert say("hold", "runs/night", "--reason", "a look at  the loss").code == 0
    held = why_held(run)
    assert held.startswith("the run is held by ada on ")
    assert held.endswith(": a look at the loss; nothing trains until `opt-train resume runs/night`")
    status = json.loads(say("status", "runs/night", "--json").out)
    assert status["stage"] == ("halted" if stage is Stage.HALTED else "held")
    assert status["hold"]["reason"] == "a look at the loss"
    again = say("hold", "runs/night")
    assert (again.code, "held already" in again.out) == (0, True)
    resumed = say("resume", "runs/night")
    assert resumed.out.startswith("took back the hold on night; ")
    assert why_held(run) == ""
    assert say("resume", "runs/night").code == 1


def test_a_hold_asked_for_while_nobody_led_is_on_record_with_the_time_it_was_asked(
    make, say
) -> None:
    run = make(Stage.TRAINING)
    before = time.time()
    say("hold", "runs/night")
    [message] = inbox.peek(run)
    state = state_of(run)
    assert state.hold is not None
    assert before - 1 <= state.hold.since == message["asked"] <= time.time()
    assert list(inbox.peek(run)) == []
    assert hold_in_force(run, state.hold) == state.hold


def test_a_resume_takes_the_place_of_a_hold_that_nobody_has_read_whatever_the_clock(
    make, say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their names a resume of a slow clock came before the hold, which stayed."""
    run = make(Stage.TRAINING)
    say("hold", "runs/night")
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    say("resume", "runs/night")
    assert [message["kind"] for message in inbox.peek(run)] == ["resume"]
    assert why_held(run) == ""


def test_a_halted_run_that_is_resumed_still_asks_its_person(make, say) -> None:
    make(Stage.HALTED)
    said = say("resume", "runs/night")
    assert (said.code, said.err) == (1, "")
    assert "why?" in said.out
    assert "when that is mended, the command that started it goes on" in said.out


def test_nothing_begins_while_a_run_is_held(make, say, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Stage.NEW)
    say("hold", "runs/night")
    from opt_train.cli import train as train_verb

    monkeypatch.setattr(train_verb, "StandaloneRun", None)  # whoever gets there has begun
    said = say("train", "name=night", "model=tiny", "train.micro_batch=1", "precision=fp32")
    assert said.code == 75, said
    assert said.out.startswith("opt-train: the run is held by ada on ")


def test_status_changes_nothing(make, say) -> None:
    run = make(Stage.TRAINING)
    say("hold", "runs/night")
    (run.inbox / "no-message").write_text("[")
    before = {path: path.stat().st_mtime_ns for path in (run.path, *run.path.rglob("*"))}
    os.chmod(run.path, 0o555)
    try:
        for words in (("runs/night",), ("runs/night", "--json")):
            assert say("status", *words).code == 0
    finally:
        os.chmod(run.path, 0o755)
    assert {p: p.stat().st_mtime_ns for p in (run.path, *run.path.rglob("*"))} == before


@pytest.mark.parametrize("verb", ["stop", "hold"])
def test_on_a_full_disk_the_sentence_names_another_way(
    make, say, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    run = make(Stage.TRAINING)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(inbox, "replace_file", full)
    with Lock.acquire(run, leader=1):
        said = say(verb, "runs/night")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert f"make space, or send TERM to process {os.getpid()} on " in said.err
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    with Lock.acquire(run, leader=1):
        said = say(verb, "runs/night")
    assert f"srun --jobid=4 --overlap kill -USR1 {os.getpid()}" in said.err


def test_a_supervisor_of_another_host_that_is_silent_is_neither_dead_nor_fine(make, say) -> None:
    run = make(Stage.TRAINING)
    lock = {"host": "far", "pid": 1, "start": "1", "slurm_job": "", "slurm_restart": 0, "leader": 1}
    run.lock.write_text(json.dumps(lock))
    assert "nothing has been seen" not in say("status", "runs/night").out
    os.utime(run.lock, (time.time() - 300, time.time() - 300))
    assert "nothing has been seen of the supervisor, process 1 on far, for 5 min" in (
        say("status", "runs/night").out
    )
    held = say("hold", "runs/night")
    assert (held.code, "whoever leads the run next does" in held.out) == (0, True)


def test_a_name_is_the_run_that_the_run_verb_would_take(make, say) -> None:
    make(Stage.STOPPED)
    assert say("status", "name=night").out == say("status", "runs/night").out
    said = say("status", "name=nihgt")
    assert (said.code, said.out) == (2, "")
    assert said.err == (
        "opt-train: name=nihgt has no run directory runs/nihgt; the nearest name there is night, "
        "and a run of another runs= is given by its path\n"
    )
    for verb in ("stop", "hold", "resume", "drill", "tickets", "checkpoints", "export"):
        words = ["--to", "x"] if verb == "export" else []
        assert say(verb, "name=nihgt", *words).err == said.err
    assert 'name="../x" names no folder' in say("status", "name=../x").err


def test_a_hold_on_record_holds_though_the_inbox_is_empty(make, say) -> None:
    run = make(Stage.STOPPED)
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        journal.append(Entry(1.0, "1.00", 7, HoldBegan("bob on n9")))
    assert "held by bob on n9 since 1970-01-01 00:00:01 UTC" in why_held(run)
    assert say("stop", "runs/night").out.startswith("nothing to stop: night: held (by bob on n9 ")
