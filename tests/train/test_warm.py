"""The warm rank as a process: what it survives, what it dies of, what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from opt_train.checkpoint import manifest
from opt_train.data.batches import ValidationSet
from opt_train.data.token_stream import open_split
from opt_train.optim.schedule import learning_rate
from opt_train.protocol.exits import STOPPED
from opt_train.protocol.facts import (
    OrderObeyed,
    Phase,
    Progress,
    SaveFailed,
    ShardsSaved,
    Validation,
    Warm,
)
from opt_train.protocol.orders import LedgerEntry, SaveAndStop
from opt_train.run.ledger import to_json
from tests.train.lr_factor import LrFactor
from tests.train.rig import ROOT, Rank, World, environment, tiny_config


def wait_for_exit(rank: Rank) -> int:
    return rank.process.wait(timeout=120)


def test_stray_signals_before_begin_neither_kill_nor_stop(tmp_path: Path) -> None:
    """Slurm's SIGTERM and SIGUSR1 reach every process of a step, spares included; Ctrl-C the whole
    terminal."""
    with World(tmp_path, tiny_config(tmp_path, steps=3), world_size=1) as world:
        rank = world.ranks[0]
        world.wait(lambda: bool(rank.published(Warm)), "warm")
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(rank.process.pid, number)
        world.begin()
        (leaving,) = world.finish()
        assert leaving.code == 0
        assert max(rank.metrics) == 3


def test_a_begin_into_a_removed_run_fails_and_does_not_bring_it_back(tmp_path: Path) -> None:
    removed = tmp_path / "removed"
    with World(tmp_path, tiny_config(tmp_path), world_size=1) as world:
        (rank,) = world.ranks
        world.begin(config_path=str(removed / "config.json"), run_directory=str(removed))
        assert wait_for_exit(rank) == 78
        assert "config.json cannot be read: No such file" in rank.log.read_text()
        assert not removed.exists()


def test_a_warm_rank_imports_nothing_of_torch_at_its_first_step(tmp_path: Path) -> None:
    """What is imported later than that makes every restart wait."""
    with World(
        tmp_path, tiny_config(tmp_path, steps=2), module="tests.train.importing_rank"
    ) as world:
        world.begin()
        world.finish()
        for rank in world.ranks:
            [line] = [
                line
                for line in rank.log.read_text().splitlines()
                if line.startswith("imported late: ")
            ]
            late = json.loads(line.removeprefix("imported late: "))
            assert [name for name in late if name.split(".")[0] == "torch"] == []


def test_stacks_go_to_the_log(tmp_path: Path) -> None:
    with World(tmp_path, tiny_config(tmp_path), world_size=1) as world:
        rank = world.ranks[0]
        world.wait(lambda: bool(rank.published(Warm)), "warm")
        os.kill(rank.process.pid, signal.SIGUSR2)
        world.wait(lambda: "in be_warm" in rank.log.read_text(), "stacks")
        assert rank.process.poll() is None


def test_closed_control_pipe_ends_a_spare_and_a_training_rank(tmp_path: Path) -> None:
    spare = Rank.start(tmp_path, 0)
    os.close(spare.control_fd)
    assert wait_for_exit(spare) == 0
    os.close(spare.facts_fd)
    with World(tmp_path, tiny_config(tmp_path, steps=100_000), world_size=1) as world:
        world.begin()
        world.wait_for_step(2)
        os.close(world.ranks[0].control_fd)
        world.ranks[0].control_fd = os.open(os.devnull, os.O_WRONLY)
        assert wait_for_exit(world.ranks[0]) == 1
        assert world.ranks[0].leaving is None
        assert "the agent is gone" in world.ranks[0].log.read_text()


def test_killed_agent_takes_its_rank_along(tmp_path: Path) -> None:
    """A rank whose agent is SIGKILLed would otherwise train on, and write, with nobody to stop
    it."""
    code = (
        "import subprocess, sys, os, time\n"
        "r, w = os.pipe(); c, d = os.pipe()\n"
        "child = subprocess.Popen([sys.executable, '-m', 'opt_train.train.warm', '--facts-fd', "
        "str(w),"
        " '--control-fd', str(c)], pass_fds=(w, c))\n"
        "os.read(r, 4096)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        agent.kill()
        deadline = time.monotonic() + 60
        while running(pid):
            assert time.monotonic() < deadline, "the rank outlived its agent"
            time.sleep(0.02)
    finally:
        agent.kill()
        agent.wait()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_orders_are_obeyed_at_one_step_and_the_ledger_goes_along(tmp_path: Path) -> None:
    """An order that every rank did not take at the same step, or that a restart forgot, would be
    training under values that nobody chose."""
    config = tiny_config(tmp_path, steps=100_000)
    module = "tests.train.lr_factor_rank"
    with World(tmp_path, config, module=module) as world:
        world.begin()
        world.wait_for_step(3)
        half = LrFactor(1, "a person asked", 0.5)
        world.ranks[0].send(half)
        world.wait(lambda: bool(world.ranks[0].published(OrderObeyed)), "the order")
        step = world.ranks[0].published(OrderObeyed)[0].step
        world.wait_for_step(step + 2)
        world.ranks[0].send(SaveAndStop(2, "enough"))
        leavings = world.finish()
        assert {(leaving.code, leaving.cause) for leaving in leavings} == {(STOPPED, "stopped")}
        assert "enough" in leavings[1].reason  # rank 1 never saw the order's pipe
        saved = world.commit(leavings[0].step)
        obeyed = [(fact.number, fact.step) for fact in world.ranks[0].published(OrderObeyed)]
        assert obeyed == [(1, step), (2, leavings[0].step)]
        rates = {number: line["lr"] for number, line in world.ranks[0].metrics.items()}
    ledger = (LedgerEntry(step, half),)
    scheduled = {number: learning_rate(config.optim, number - 1, 100_000) for number in rates}
    # A metrics line is numbered after its batch: that of batch `step` is `step + 1`.
    assert rates == {n: rate * (0.5 if n > step else 1) for n, rate in scheduled.items()}
    assert manifest.read(saved).state["ledger"] == to_json(ledger)

    later = LedgerEntry(leavings[0].step + 2, LrFactor(3, "and again", 0.5))
    with World(tmp_path, config, module=module) as world:
        world.begin(checkpoint=saved, generation=2, ledger=(*ledger, later), order_number=3)
        world.wait_for_step(later.step + 2)
        assert world.in_force()["lr"] == 0.5 * learning_rate(
            config.optim, leavings[0].step, 100_000
        )
        for number, line in world.ranks[0].metrics.items():
            factor = 0.25 if number > later.step else 0.5
            assert line["lr"] == factor * learning_rate(config.optim, number - 1, 100_000)


def test_failed_save_does_not_kill_training(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=100_000)
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=4))
    with World(tmp_path, config) as world:
        run_directory = tmp_path / "run"
        run_directory.mkdir()
        # A file where the folder should be: fails for root too, as a read-only mode would not.
        (run_directory / "checkpoints").write_text("")
        world.begin()
        world.wait(lambda: all(rank.published(SaveFailed) for rank in world.ranks), "the failure")
        world.wait_for_step(world.ranks[0].published(SaveFailed)[0].step + 3)
        os.kill(world.ranks[1].process.pid, signal.SIGTERM)
        leavings = world.finish()
        assert {leaving.code for leaving in leavings} == {STOPPED}
        assert "the last committed checkpoint counts" in leavings[0].reason
        assert not any(rank.published(ShardsSaved) for rank in world.ranks)


def test_phases_are_published_and_validation_covers_the_set(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=6, validate_every=3)
    with World(tmp_path, config) as world:
        world.begin()
        world.finish()
        for rank in world.ranks:
            phases = [fact.phase for fact in rank.published(Phase)]
            assert phases[0] == "start"
            assert set(phases) == {"start", "waiting", "data", "step", "evaluation", "checkpoint"}
        first, last = world.ranks[0].published(Validation)
        assert not world.ranks[1].published(Validation)
        assert (first.step, last.step) == (3, 6)
        assert first.loss > last.loss > 1.0
        validation = ValidationSet(
            open_split(Path(config.data.directory), "validation", verify=False), 64
        )
        assert validation.sequences % (2 * config.train.micro_batch), (
            "some of what the ranks read is padding"
        )
        assert first.tokens == last.tokens == 64 * validation.sequences, (
            "padding counts for nothing"
        )
        assert any(rank.published(Progress) for rank in world.ranks)


def test_exception_exits_1_at_once_and_says_why_in_the_log(tmp_path: Path) -> None:
    """A rank that hung in a destructor would keep its generation alive until somebody's timeout."""
    with World(tmp_path, tiny_config(tmp_path, steps=100_000)) as world:
        world.begin()
        world.wait_for_step(2)
        os.kill(world.ranks[0].process.pid, signal.SIGKILL)
        assert wait_for_exit(world.ranks[1]) == 1
        assert world.ranks[1].leaving is None
        assert "Traceback" in world.ranks[1].log.read_text()
