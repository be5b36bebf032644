"""Two processes must never write one journal, and a dead one must never keep a living one out."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from opt_logbook.record.lock import (
    Holder,
    Lock,
    LockHeld,
    LockLost,
    holder_of,
    live_holder_of,
    start_of,
)
from opt_logbook.record.run_directory import RunDirectory

CONTENDER = """
import sys, time
from pathlib import Path
from opt_logbook.record.lock import Lock, LockHeld
from opt_logbook.record.run_directory import RunDirectory

print("ready", flush=True)
sys.stdin.readline()
try:
    Lock.acquire(RunDirectory(Path(sys.argv[1])), leader=int(sys.argv[2]))
    print("won", flush=True)
except LockHeld:
    print("lost", flush=True)
sys.stdin.readline()
"""


def contend(path: Path, count: int) -> list[str]:
    """Start `count` processes, let them all go for the lock at once, and say what each tells."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, str(path), str(n + 1)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(count)
    ]
    answers = []
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout is not None
            answers.append(process.stdout.readline().strip())
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return answers


def test_of_many_processes_exactly_one_wins_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    for _ in range(3):  # each round finds the stale lock of the winner before, and takes it over
        assert sorted(contend(tmp_path, 12)) == ["lost"] * 11 + ["won"]
        assert holder_of(RunDirectory(tmp_path)) is not None
        assert live_holder_of(RunDirectory(tmp_path)) is None


def test_a_live_holder_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    lock = Lock.acquire(run, leader=4)
    mine = Holder.myself(4)
    assert holder_of(run) == live_holder_of(run) == mine
    with pytest.raises(LockHeld, match=rf"process {mine.pid} on {mine.host}; stop it first"):
        Lock.acquire(run)
    lock.release()
    assert holder_of(run) is None
    assert Lock.acquire(run, leader=5).is_mine()


def test_a_lock_that_cannot_be_given_back_does_not_hide_what_the_run_came_to(
    tmp_path: Path,
) -> None:
    """A file system that has become read-only raised at the very end, and a saved state was told as
    bad input."""
    run = RunDirectory(tmp_path)
    with Lock.acquire(run):
        run.lock.unlink()
        run.lock.mkdir()  # cannot be opened for writing, root or not


def plant(run: RunDirectory, **changes: object) -> None:
    run.lock.write_text(json.dumps(dataclasses.asdict(Holder.myself()) | changes))


def test_a_process_number_that_was_given_to_somebody_else_is_stale(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    plant(run, start="12@another-boot")
    assert Lock.acquire(run).is_mine()


def test_of_another_host_nothing_is_known(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    plant(run, host="node-far-away", pid=1, slurm_job="77")
    with pytest.raises(LockHeld, match=r"node-far-away \(Slurm job 77\).*remove .*journal.lock"):
        Lock.acquire(run)


def test_a_requeued_job_takes_over_from_its_earlier_start_on_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    plant(run, host="node-far-away", slurm_job="77", slurm_restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(LockHeld):  # another process of the same start of the job
        Lock.acquire(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert Lock.acquire(run).is_mine()


def test_a_zombie_holds_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        while start_of(process.pid) is not None:
            pass  # it is not waited for yet, so its number is still in the process table
        assert Path(f"/proc/{process.pid}").exists()


@pytest.mark.parametrize(
    "text", ["", "{", '{"host": "a"}', "[]", '{"host":"a","pid":"x","start":""}', "\x00" * 50]
)
def test_a_half_written_lock_is_nobody_s(tmp_path: Path, text: str) -> None:
    run = RunDirectory(tmp_path)
    run.lock.write_text(text)
    assert holder_of(run) is None
    assert Lock.acquire(run).is_mine()


def test_who_was_replaced_knows_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    lock = Lock.acquire(run, leader=1)
    lock.set_leader(2)
    assert lock.leader == 2
    assert lock.is_mine()
    plant(run, leader=3)
    assert not lock.is_mine()
    with pytest.raises(LockLost):
        lock.set_leader(4)
    lock.release()
    assert holder_of(run) == Holder.myself(3), "a lost lock is not ours to release"


def test_a_lock_removed_by_hand_can_be_taken_and_the_old_holder_is_fenced(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    old = Lock.acquire(run, leader=1)
    run.lock.unlink()
    new = Lock.acquire(run, leader=2)
    assert new.is_mine()
    assert not old.is_mine()
