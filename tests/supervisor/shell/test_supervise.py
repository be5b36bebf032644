"""The shell around a tiny core, with a real agent and real files: order, barriers, sick disks,
deaths and endings."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record import inbox, journal
from opt_logbook.record.events import Entry, JournalDamaged, Note
from opt_logbook.record.lock import Lock, live_holder_of
from opt_logbook.record.run_directory import RunDirectory

from opt_train.link.address import read_address
from opt_train.protocol.exits import PERSON_MUST_DECIDE, BadInput
from opt_train.supervisor.effects import Effect, Finish, Send
from opt_train.supervisor.inputs import (
    HeartbeatReceived,
    InboxReceived,
    Input,
    JournalWasStalled,
    Now,
    StopAsked,
    Tick,
)
from opt_train.supervisor.shell import start as shell
from opt_train.supervisor.shell.start import supervise
from tests.agent.harness import HERE, begin, config_of, created, make_run
from tests.processes import processes_of
from tests.supervisor.shell.tiny_core import TinyCore, entry


@pytest.fixture(autouse=True)
def _ranks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parent.parent}")


def run_shell(run: RunDirectory, core: TinyCore, plan: str = "") -> tuple[int, str]:
    stream = io.StringIO()
    code = supervise(config_of(run, plan), run, created(), make_core=core, stream=stream)
    return code, stream.getvalue()


def notes(run: RunDirectory) -> list[str]:
    return [e.event.text for e in journal.read(run.journal).entries if isinstance(e.event, Note)]


def wait_for(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def test_a_run_from_start_to_end_leaves_files_and_no_process(
    run: RunDirectory, tmp_path: Path
) -> None:
    code, output = run_shell(run, TinyCore(run, steps=10))
    assert code == 0
    assert notes(run) == ["begin", "exit 0"]
    assert [
        json.loads(line)["step"] for line in run.metrics_of("1.00").read_text().splitlines()
    ] == list(range(10))
    assert journal.read(run.journal).damaged == ()
    assert live_holder_of(run) is None, "the lock was not released"
    published = read_address(run.supervisor_address)
    assert published is None or not published.endpoint.path.parent.exists()
    assert not processes_of(tmp_path)
    assert "training" in output
    assert output.rstrip().endswith("done")
    assert "supervisor 1" in (run.logs / "supervisor.log").read_text()


def test_an_attempts_first_metrics_line_carries_the_head_of_the_journal(run: RunDirectory) -> None:
    run_shell(run, TinyCore(run, steps=2))
    first = json.loads(run.metrics_of("1.00").read_text().splitlines()[0])
    lines = [f"{e.seq} {e.hash}" for e in journal.read(run.journal).entries]
    assert first["journal_head"] in lines, "a tail cut off the journal would not be found"


class SickJournal:
    """Makes the journal's appends misbehave while `sick` is set: a file system that hangs, or is
    full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0) -> None:
        self.healthy = threading.Event()
        self.healthy.set()
        self.durable: list[tuple[float, Entry]] = []
        original = journal.Journal.append

        def append(this: journal.Journal, line: Entry) -> Entry:
            if error and not self.healthy.is_set():
                raise OSError(error, os.strerror(error))
            self.healthy.wait(20)
            appended = original(this, line)
            self.durable.append((time.monotonic(), appended))
            return appended

        monkeypatch.setattr(journal.Journal, "append", append)


@pytest.mark.parametrize("error", [0, errno.ENOSPC], ids=["hanging", "full"])
def test_a_sick_journal_holds_back_decisions_and_nothing_else(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    sick = SickJournal(monkeypatch, error)
    began: list[float] = []

    def react(input_: Input, now: Now) -> list[Effect] | None:
        if (
            isinstance(input_, HeartbeatReceived)
            and input_.heartbeat.slots[0].step > 2
            and not began
        ):
            began.append(time.monotonic())
            sick.healthy.clear()
            threading.Timer(3.0, sick.healthy.set).start()
            # The order goes out behind the entry that announces it.
            return [
                entry(now, Note("core", "announced")),
                Send("node-1", begin(run, generation=2, steps=3)),
            ]
        return None

    core = TinyCore(run, react, steps=10_000, step_seconds=0.02)
    code, output = run_shell(run, core)
    assert code == 0
    announced = next(
        at for at, e in sick.durable if isinstance(e.event, Note) and e.event.text == "announced"
    )
    assert announced - began[0] >= 3.0

    def during(kind: type[Input]) -> list[float]:
        return [at for at in core.received_at(kind) if began[0] < at < began[0] + 3.0]

    assert len(during(Tick)) >= 5, "the event loop stood still"
    assert len(during(HeartbeatReceived)) >= 1, "agents were not heard"
    pulses = [
        (at, i.heartbeat.slots[0]) for at, i in core.inputs if isinstance(i, HeartbeatReceived)
    ]
    early = [slot for at, slot in pulses if began[0] < at < announced]
    assert {slot.generation for slot in early} == {1}, (
        "a decision was visible before it was durable"
    )
    assert [i for _, i in core.inputs if isinstance(i, JournalWasStalled) and i.seconds >= 2.0]
    if error:
        assert "No space left" in output, "a person was not told"


def test_what_lies_in_the_inbox_is_journalled_at_once_and_then_removed(run: RunDirectory) -> None:
    dropped: list[float] = []

    def react(input_: Input, now: Now) -> list[Effect] | None:
        if isinstance(input_, HeartbeatReceived) and not dropped:
            inbox.drop(run, {"kind": "note", "author": "ada", "text": "the loss looks odd"})
            inbox.drop(run, {"kind": "note", "author": "ada"})
            inbox.drop(run, {"kind": "launch-missiles", "by": "mallory"})
            (run.inbox / "00-junk.json").write_text("{")
            dropped.append(time.monotonic())
        return None

    core = TinyCore(run, react, steps=120, step_seconds=0.02)
    run_shell(run, core)
    assert notes(run).count("the loss looks odd") == 1
    assert len(core.received_at(InboxReceived)) == 1, "the core was told what is no message"
    assert core.received_at(InboxReceived)[0] - dropped[0] < 3.0
    assert [p.name for p in run.inbox.iterdir()] == ["refused"]


def test_a_stop_waits_while_the_run_stops_to_go_on_by_itself(run: RunDirectory) -> None:
    core = TinyCore(run, steps=60, step_seconds=0.02)
    core.goes_on_after_stop = True
    inbox.drop(run, {"kind": "stop", "by": "ada"})
    run_shell(run, core)
    assert core.received_at(InboxReceived) == []
    assert [dropped.message["kind"] for dropped in inbox.waiting(run)] == ["stop"]


@pytest.mark.parametrize("goes_on", [False, True])
def test_ctrl_c_is_not_lost_while_the_run_stops_to_go_on_by_itself(
    run: RunDirectory, goes_on: bool
) -> None:
    interrupted = []

    def react(input_: Input, now: Now) -> list[Effect] | None:
        if isinstance(input_, HeartbeatReceived) and not interrupted:
            interrupted.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return None

    core = TinyCore(run, react, steps=60, step_seconds=0.02)
    core.goes_on_after_stop = goes_on
    run_shell(run, core)
    stops = [dropped.message for dropped in inbox.waiting(run)]
    assert stops == ([{"kind": "stop", "by": "SIGINT"}] if goes_on else [])
    assert bool(core.received_at(StopAsked)) is not goes_on


def test_an_inbox_that_cannot_be_read_leaves_nobody_without_a_supervisor(run: RunDirectory) -> None:
    """A file server that answers with errors for a moment must not end the one process that would
    handle it."""

    def react(input_: Input, now: Now) -> list[Effect] | None:
        if isinstance(input_, HeartbeatReceived) and not run.inbox.is_symlink():
            run.inbox.symlink_to(run.inbox)  # a loop: listing it is an OSError
        return None

    code, output = run_shell(run, TinyCore(run, react, steps=60, step_seconds=0.02))
    assert (code, notes(run)) == (0, ["begin", "exit 0"]), output
    assert "the inbox cannot be read" in (run.logs / "supervisor.log").read_text()


def test_a_letter_that_cannot_be_removed_is_journalled_once(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told again at every look, it would fill the journal with a line twice a second."""

    def refuse(dropped: inbox.Dropped) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(inbox.Dropped, "remove", refuse)
    inbox.drop(run, {"kind": "note", "author": "ada", "text": "the loss looks odd"})
    run_shell(run, TinyCore(run, steps=120, step_seconds=0.02))
    assert notes(run).count("the loss looks odd") == 1


def test_a_signal_is_told_and_the_nodes_are_given_back(run: RunDirectory, tmp_path: Path) -> None:
    asked: list[float] = []

    def react(input_: Input, now: Now) -> list[Effect] | None:
        if (
            isinstance(input_, HeartbeatReceived)
            and input_.heartbeat.slots[0].step >= 3
            and not asked
        ):
            asked.append(now.monotonic)
            os.kill(os.getpid(), signal.SIGINT)
        return None

    code, output = run_shell(run, TinyCore(run, react, steps=10_000))
    assert code == 75
    assert "stop SIGINT" in notes(run)
    assert output.rstrip().endswith("stopped")
    assert not processes_of(tmp_path)


def test_an_agent_that_has_not_dialled_in_is_not_waited_for(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while nodes were assembling took eight seconds."""
    monkeypatch.setattr(
        shell, "_render_chronicle", lambda run, stream: None
    )  # it takes time of its own
    ended: list[float] = []

    def react(input_: Input, now: Now) -> list[Effect] | None:
        ended.append(time.monotonic())
        return [Finish(75, "stopped")]

    run_shell(run, TinyCore(run, react))
    assert time.monotonic() - ended[0] < 6.0
    assert not processes_of(tmp_path)


def test_a_mistake_in_the_core_is_told_and_the_ranks_are_left_to_the_next_supervisor(
    run: RunDirectory, tmp_path: Path
) -> None:
    def fail(input_: Input, now: Now) -> list[Effect] | None:
        if isinstance(input_, HeartbeatReceived) and input_.heartbeat.slots[0].step > 3:
            raise RuntimeError("a mistake in a rule")
        return None

    def adopt(input_: Input, now: Now) -> list[Effect] | None:
        runs = (
            isinstance(input_, HeartbeatReceived) and input_.heartbeat.slots[0].stage == "running"
        )
        return [Finish(0, "done")] if runs else None

    code, output = run_shell(run, TinyCore(run, fail, steps=10_000, step_seconds=0.05))
    assert code == PERSON_MUST_DECIDE
    assert "a mistake in a rule" in output
    assert "Traceback" not in output
    assert "Traceback" in (run.logs / "supervisor.log").read_text()
    assert live_holder_of(run) is None
    assert processes_of(tmp_path), "the ranks should train on"
    code, _ = run_shell(run, TinyCore(run, adopt))
    assert code == 0
    assert notes(run) == ["begin", "adopted"]


def test_a_killed_supervisor_is_replaced_while_the_same_ranks_train_on(
    run: RunDirectory, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.supervisor.shell.supervise_for_test",
        str(run.path),
        "140",
    ]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=HERE.parent.parent, stdout=subprocess.DEVNULL, start_new_session=True
        )

    first = start()
    try:
        wait_for(
            lambda: (
                run.metrics_of("1.00").exists()
                and len(run.metrics_of("1.00").read_text().splitlines()) > 5
            )
        )
        published = read_address(run.supervisor_address)
    finally:
        first.kill()
        first.wait()
    second = start()
    try:
        assert second.wait(40) == 0
    finally:
        second.kill()
        second.wait()
    assert notes(run) == ["begin", "adopted", "exit 0"]
    who = (run.path / "who_trains.log").read_text().splitlines()
    assert len(who) == len(set(who)) == 140
    steps = [json.loads(line)["step"] for line in run.metrics_of("1.00").read_text().splitlines()]
    assert sorted(steps) == list(range(140)), (
        "metrics of the time without a supervisor were lost or written twice"
    )
    assert published is not None
    assert not published.endpoint.path.parent.exists(), (
        "the killed supervisor's socket folder is still there"
    )


def test_a_damaged_journal_is_led_on_only_after_a_person_has_looked(run: RunDirectory) -> None:
    code, _ = run_shell(run, TinyCore(run, steps=3))
    assert code == 0
    lines = run.journal.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"seq":2', b'"seq":7')
    run.journal.write_bytes(b"".join(lines))

    code, output = run_shell(run, TinyCore(run, steps=3))
    assert code == PERSON_MUST_DECIDE
    assert f"{run.journal} is damaged (line 2: " in output
    assert not list(run.nodes.glob("*/agent.json")), "agents were started over a damaged journal"
    damaged = [e for e in journal.read(run.journal).entries if isinstance(e.event, JournalDamaged)]
    assert damaged[0].event.line == 2

    code, _ = run_shell(run, TinyCore(run, steps=3))
    assert code == 0, "the person's second start is the yes"


def test_a_run_that_somebody_has_is_refused_in_a_sentence(run: RunDirectory) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        with Lock.acquire(run):
            holder = json.loads(run.lock.read_text())
            start = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
            holder |= {"pid": child.pid, "start": start + "@" + holder["start"].partition("@")[2]}
            run.lock.write_text(json.dumps(holder))
            with pytest.raises(BadInput, match=str(child.pid)):
                run_shell(run, TinyCore(run))
    finally:
        child.kill()
        child.wait()
        run.lock.unlink()


def test_a_run_that_was_removed_is_told_as_such_and_not_made_again(tmp_path: Path) -> None:
    """The rendered chronicle of nothing was all that then lay there, and another process was
    blamed."""
    (tmp_path / "short").mkdir()
    run = make_run(tmp_path / "short", orphan_seconds=3.0)

    def react(input_: Input, now: Now) -> list[Effect] | None:
        if isinstance(input_, HeartbeatReceived) and input_.heartbeat.slots[0].step > 3:
            while run.path.exists():  # the ranks and the agent still write there
                shutil.rmtree(run.path, ignore_errors=True)
            return [entry(now, Note("core", "too late"))]
        return None

    code, output = run_shell(run, TinyCore(run, react, steps=10_000))
    assert code == PERSON_MUST_DECIDE
    assert "was removed" in output
    assert "another process" not in output
    assert not run.chronicle.exists()


def test_a_supervisor_that_lost_the_lock_writes_and_kills_nothing_more(
    run: RunDirectory, tmp_path: Path
) -> None:
    def react(input_: Input, now: Now) -> list[Effect] | None:
        if isinstance(input_, HeartbeatReceived) and input_.heartbeat.slots[0].step > 3:
            run.lock.write_text("{}")
            return [entry(now, Note("core", "too late")), Finish(0, "not reached")]
        return None

    code, output = run_shell(run, TinyCore(run, react, steps=10_000))
    assert code == PERSON_MUST_DECIDE
    assert "another process has taken the run" in output
    assert "too late" not in notes(run)
    assert processes_of(tmp_path), "the ranks belong to whoever leads now"
    code, _ = run_shell(
        run,
        TinyCore(
            run,
            lambda input_, now: (
                [Finish(0, "done")] if isinstance(input_, HeartbeatReceived) else None
            ),
        ),
    )
    assert code == 0
