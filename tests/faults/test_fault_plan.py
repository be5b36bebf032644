"""Fault plans: what they refuse, whom they hit, and that no fault is done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from opt_logbook.record import journal
from opt_logbook.record.run_directory import RunDirectory

from opt_train.faults.config import FaultsConfig
from opt_train.faults.plan import Fault, FaultPlan, InjectedFault, parse
from opt_train.host.processes import stat_of
from opt_train.protocol.exits import BadInput
from opt_train.protocol.facts import Heartbeat, SlotState
from opt_train.supervisor.effects import Effect, Finish
from opt_train.supervisor.inputs import (
    ClusterObserved,
    HeartbeatReceived,
    Input,
    MetricsReceived,
    Now,
)
from tests.agent.harness import HERE
from tests.supervisor.shell.test_supervise import run_shell
from tests.supervisor.shell.tiny_core import TinyCore


def pulse(
    node: str, generation: int, rank: int, pid: int = 1, stage: str = "running"
) -> HeartbeatReceived:
    return HeartbeatReceived(
        node,
        Heartbeat((SlotState(slot=0, stage=stage, pid=pid, generation=generation, rank=rank),)),
    )


def metrics(generation: int, step: int) -> Input:
    return MetricsReceived("node-1", generation, {"step": step})


def injected_by(plan: FaultPlan, *inputs: Input) -> list[InjectedFault]:
    return [fault for input_ in inputs if (fault := plan.due(input_)) is not None]


def test_a_plan_is_read_in_the_order_of_its_steps() -> None:
    assert parse("") == ()
    assert parse(" kill-rank@120,kill-node@60 ,") == (
        Fault("kill-node", 60),
        Fault("kill-rank", 120),
    )


@pytest.mark.parametrize(
    "plan", ["kill-nod@60", "kill-node", "kill-node@", "kill-node@-1", "@3", "kill-node@6e1", "x"]
)
def test_a_bad_plan_is_refused_with_an_example(plan: str) -> None:
    with pytest.raises(BadInput, match=r"write 'faults\.plan=.kill-node@60, kill-rank@120.'"):
        parse(plan)


def test_the_seed_chooses_the_victim_among_those_that_train(tmp_path: Path) -> None:
    def victims(seed: int) -> list[tuple[str, int]]:
        plan = FaultPlan(FaultsConfig(plan="kill-rank@5", seed=seed), tmp_path / "none.jsonl")
        inputs = [
            pulse("node-2", 1, 1),
            pulse("node-1", 1, 0),
            pulse("node-3", 0, -1, stage="warm"),
            metrics(1, 5),
        ]
        return [(fault.node, fault.rank) for fault in injected_by(plan, *inputs)]

    seen = {tuple(victims(seed)) for seed in range(20)}
    assert seen == {(("node-1", 0),), (("node-2", 1),)}, (
        "both may be hit, the buffer node and nobody never"
    )
    assert victims(3) == victims(3)


def test_a_generation_is_harmed_once_and_the_next_fault_waits_for_the_next_one(
    tmp_path: Path,
) -> None:
    plan = FaultPlan(FaultsConfig(plan="kill-node@5, kill-rank@6"), tmp_path / "none.jsonl")
    first = injected_by(
        plan, pulse("node-1", 1, 0), metrics(1, 4), metrics(1, 5), metrics(1, 6), metrics(1, 7)
    )
    assert [(fault.kind, fault.step) for fault in first] == [("kill-node", 5)]
    assert injected_by(plan, metrics(2, 4)) == []
    second = injected_by(plan, pulse("node-1", 2, 0), metrics(2, 6), metrics(2, 7))
    assert [(fault.kind, fault.generation) for fault in second] == [("kill-rank", 2)]


class Bystander:
    """Stands for a cluster; counts what is asked of it and whether it was on record by then."""

    def __init__(self, record: Path) -> None:
        self.record = record
        self.fenced: list[str] = []

    def fence(self, node: str) -> bool:
        assert node in self.record.read_text(), "the fault was done before it was on record"
        self.fenced.append(node)
        return True

    def agent_pid(self, node: str) -> int | None:
        return 4711

    def signal_process(self, node: str, pid: int, number: int) -> bool:
        return True


def test_a_restarted_supervisor_does_not_repeat_a_fault_even_after_a_torn_record(
    tmp_path: Path,
) -> None:
    record = tmp_path / "faults.jsonl"
    config = FaultsConfig(plan="kill-node@5, kill-node@9")
    plan = FaultPlan(config, record)
    [fault] = injected_by(plan, pulse("node-1", 1, 0), metrics(1, 5))
    bystander = Bystander(record)
    plan.do(fault, bystander)
    assert bystander.fenced == ["node-1"]
    assert json.loads(record.read_text())["pid"] == 4711
    record.write_text(record.read_text() + '{"index": 1, "ti')
    again = FaultPlan(config, record)
    assert injected_by(again, pulse("node-1", 1, 0), metrics(1, 5), metrics(1, 9)) == [], (
        "generation 1 was harmed already"
    )
    [other] = injected_by(again, pulse("node-1", 2, 0), metrics(2, 9))
    again.do(other, bystander)
    assert len(bystander.fenced) == 2
    assert injected_by(FaultPlan(config, record), pulse("node-1", 3, 0), metrics(3, 10)) == []


@pytest.mark.parametrize(
    ("kind", "expected"), [("kill-rank", "exit None"), ("kill-node", ""), ("stop-rank", "")]
)
def test_faults_hit_real_processes(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, kind: str, expected: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parent.parent}")

    def react(input_: Input, now: Now) -> list[Effect] | None:
        if (
            kind == "kill-node"
            and isinstance(input_, ClusterObserved)
            and "SIGKILL" in input_.reasons.get("node-1", "")
        ):
            return [Finish(0, input_.reasons["node-1"])]
        if (
            kind == "stop-rank"
            and isinstance(input_, HeartbeatReceived)
            and input_.heartbeat.slots[0].process_state == "T"
        ):
            return [Finish(0, "stopped")]
        return None

    code, _ = run_shell(run, TinyCore(run, react, steps=10_000), plan=f"{kind}@4")
    assert code == 0
    [fault] = [json.loads(line) for line in run.faults.read_text().splitlines()]
    assert (fault["kind"], fault["node"]) == (kind, "node-1")
    assert fault["step"] >= 4
    assert fault["pid"] > 0
    assert stat_of(fault["pid"]) is None
    if expected:
        texts = [getattr(e.event, "text", "") for e in journal.read(run.journal).entries]
        assert expected in texts


def test_a_fault_can_kill_the_supervisor_itself_and_is_not_repeated(run: RunDirectory) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.supervisor.shell.supervise_for_test",
        str(run.path),
        "60",
        "kill-supervisor@5",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}"}
    codes = []
    for _ in range(2):
        child = subprocess.Popen(
            command, cwd=HERE.parent.parent, env=environment, stdout=subprocess.DEVNULL
        )
        try:
            codes.append(child.wait(30))
        finally:
            child.kill()
            child.wait()
        time.sleep(0.1)
    assert codes == [-signal.SIGKILL, 0]
    assert len(run.faults.read_text().splitlines()) == 1
