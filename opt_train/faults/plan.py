"""Seeded faults, for demonstrations and tests: real signals to real processes at planned steps.

What is done goes to `faults.jsonl`, durable before it is done, so that a supervisor that starts
again repeats nothing. Tests alone read that file: a diagnosis that knew the plan would prove
nothing.
"""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from opt_train.faults.config import FaultsConfig
from opt_train.protocol.exits import BadInput
from opt_train.protocol.facts import SlotState
from opt_train.supervisor.inputs import (
    AgentConnected,
    AgentDisconnected,
    HeartbeatReceived,
    Input,
    MetricsReceived,
)

KINDS = ("kill-node", "kill-rank", "stop-rank", "kill-supervisor")
_EXAMPLE = """write 'faults.plan="kill-node@60, kill-rank@120"'"""
"""As a shell wants it: that eats the outer quotes, and Hydra needs the inner ones."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault: at `step` of the run, for the first time that training gets there."""

    kind: str
    step: int


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """One line of `faults.jsonl`. `node` is empty and `rank` -1 where no single one was hit."""

    index: int
    """Place in the plan, from 0."""
    time: float
    step: int
    kind: str
    generation: int
    node: str
    rank: int
    pid: int


class Victims(Protocol):
    """The part of a cluster that a fault needs."""

    def fence(self, node: str) -> bool:
        """Kill every process of the node."""

    def agent_pid(self, node: str) -> int | None:
        """The living agent's pid."""

    def signal_process(self, node: str, pid: int, number: int) -> bool:
        """Send a signal to a process of the node."""


def parse(plan: str) -> tuple[Fault, ...]:
    """The faults of a plan such as ``kill-node@60, kill-rank@120``, in the order of their steps.

    Raises:
        BadInput: a part of it is no fault.
    """
    faults = []
    for part in filter(None, (p.strip() for p in plan.split(","))):
        match = re.fullmatch(r"([a-z-]+)@([0-9]{1,9})", part)
        if match is None or match[1] not in KINDS:
            raise BadInput(
                f"faults.plan: {part!r} is not <kind>@<step> with a kind of {', '.join(KINDS)}; "
                f"{_EXAMPLE}"
            )
        faults.append(Fault(match[1], int(match[2])))
    return tuple(sorted(faults, key=lambda fault: fault.step))


class FaultPlan:
    """Watches the inputs of a supervisor; `due` names the next fault when training has come to its
    step."""

    def __init__(self, config: FaultsConfig, record: Path) -> None:
        """`record` is the run's `faults.jsonl`. Raises BadInput for a bad plan."""
        self._plan = parse(config.plan)
        self._seed = config.seed
        self._record = record
        done = _read(record)
        self._done = {fault.index for fault in done}
        # The ranks outlive their supervisor, so the fault that kills it harms no generation.
        self._harmed = max(
            (fault.generation for fault in done if fault.kind != "kill-supervisor"), default=-1
        )
        self._slots: dict[str, tuple[SlotState, ...]] = {}

    def due(self, input_: Input) -> InjectedFault | None:
        """The fault to inject now, after `input_`, if any. It counts as done from here on."""
        match input_:
            case HeartbeatReceived(node=node, heartbeat=heartbeat):
                self._slots[node] = heartbeat.slots
            case AgentConnected(node=node, state=state):
                self._slots[node] = state.slots
            case AgentDisconnected(node=node):
                self._slots.pop(node, None)
            case MetricsReceived(generation=generation, line=line):
                return self._due(generation, line["step"])
        return None

    def _due(self, generation: int, step: int) -> InjectedFault | None:
        for index, fault in enumerate(self._plan):
            if index in self._done or step < fault.step:
                continue
            injected = self._choose_victim(index, fault, generation, step)
            if injected is not None:
                self._done.add(index)
            return injected
        return None

    def _choose_victim(
        self, index: int, fault: Fault, generation: int, step: int
    ) -> InjectedFault | None:
        if fault.kind == "kill-supervisor":
            return InjectedFault(index, _now(), step, fault.kind, generation, "", -1, os.getpid())
        # A generation is harmed once: the next fault waits until training has recovered from the
        # last.
        ranks = sorted(
            (slot.rank, node, slot.pid)
            for node, slots in self._slots.items()
            for slot in slots
            if slot.stage == "running" and slot.generation == generation > self._harmed
        )
        if not ranks:
            return None
        # Chosen by seed, kept secret from nobody.
        chance = random.Random(f"{self._seed}:{index}")  # noqa: S311
        if fault.kind == "kill-node":
            node = chance.choice(sorted({node for _, node, _ in ranks}))
            rank, pid = -1, 0
        else:
            rank, node, pid = chance.choice(ranks)
        self._harmed = generation
        return InjectedFault(index, _now(), step, fault.kind, generation, node, rank, pid)

    def do(self, fault: InjectedFault, victims: Victims) -> None:
        """Record the fault, durably, and inject it. May block; not for an event loop."""
        if fault.kind == "kill-node":
            fault = InjectedFault(**(asdict(fault) | {"pid": victims.agent_pid(fault.node) or 0}))
        with open(self._record, "ab+") as file:
            # A supervisor that died in the middle of its line must not take this one with it.
            torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
            file.write(b"\n" * torn + json.dumps(asdict(fault)).encode() + b"\n")
            file.flush()
            # Durable before it is injected: `kill-supervisor` ends this very process, and its
            # successor would end itself in turn, for ever.
            os.fsync(file.fileno())
        injections: dict[str, Callable[[], object]] = {
            "kill-node": lambda: victims.fence(fault.node),
            "kill-rank": lambda: victims.signal_process(fault.node, fault.pid, signal.SIGKILL),
            "stop-rank": lambda: victims.signal_process(fault.node, fault.pid, signal.SIGSTOP),
            "kill-supervisor": lambda: os.kill(fault.pid, signal.SIGKILL),
        }
        injections[fault.kind]()


def _read(record: Path) -> list[InjectedFault]:
    try:
        lines = record.read_text().splitlines()
    except OSError:
        return []
    injected = []
    for line in lines:
        try:
            injected.append(InjectedFault(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # torn by a death before it was done
    return injected


def _now() -> float:
    return round(time.time(), 3)
