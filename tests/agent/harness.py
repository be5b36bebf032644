"""A supervisor's end of the links, for tests of real agents: it records all inputs, and sends
what it is asked."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from opt_logbook.record.events import RunCreated
from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent.rank_log import LogCopies
from opt_train.agent.rank_starter import RankStarter
from opt_train.config.run_config import RunConfig
from opt_train.faults.config import FaultsConfig
from opt_train.host.processes import NODE_MARK, mark_of
from opt_train.link.address import Address, publish
from opt_train.link.endpoint import (
    Endpoint,
    TcpEndpoint,
    UnixEndpoint,
    make_socket_path,
    remove_endpoint,
)
from opt_train.link.secret import ensure_secret
from opt_train.protocol.commands import Acknowledge, Begin, Leave
from opt_train.protocol.facts import RankFact, SlotState
from opt_train.supervisor.config import SupervisorConfig
from opt_train.supervisor.inputs import AgentConnected, FactReceived, HeartbeatReceived, Input
from opt_train.supervisor.shell.agent_server import AgentServer

T = TypeVar("T")
RANK_MODULE = "stdlib_rank"
HERE = Path(__file__).parent


def make_run(folder: Path, **supervisor: Any) -> RunDirectory:
    """A run directory with what an agent reads."""
    run = RunDirectory(folder / "run")
    run.path.mkdir()
    run.config_json.write_text(
        json.dumps(
            {
                "supervisor": supervisor,
                "cluster": {"kind": "local", "nodes": 2, "rank_module": RANK_MODULE},
            }
        )
    )
    ensure_secret(run.secret)
    return run


def environment(**more: str) -> dict[str, str]:
    inherited = filter(None, [os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *inherited]), **more}


def start_agent(
    run: RunDirectory, node: str = "node-1", slots: int = 1, **more: str
) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "opt_train.agent",
        "--run",
        str(run.path),
        "--node",
        node,
    ]
    folder = run.nodes / node
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "agent.log").open("ab") as output:
        return subprocess.Popen(
            [*command, "--slots", str(slots)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(**{NODE_MARK: mark_of(run.path, node)}, **more),
        )


def make_starter(run: RunDirectory, module: str = RANK_MODULE, **more: str) -> RankStarter:
    """One without an agent."""
    return RankStarter(module, environment(**more), LogCopies(run), run.logs / "warm" / "node-1")


def begin(
    run: RunDirectory, generation: int = 1, rank: int = 0, slot: int = 0, **config: Any
) -> Begin:
    """A `Begin` for the stdlib rank, whose configuration is written beside."""
    path = run.path / f"rank-{generation}-{rank}.json"
    path.write_text(json.dumps(config))
    return Begin(
        generation=generation,
        attempt=f"1.{generation - 1:02d}",
        node="node-1",
        slot=slot,
        rank=rank,
        world_size=2,
        local_rank=slot,
        store_host="127.0.0.1",
        store_port=0 if rank == 0 else 4242,
        config_path=str(path),
        config_sha256="",
        run_directory=str(run.path),
        checkpoint=None,
        manifest_sha256=None,
        order_number=0,
    )


def make_endpoint(transport: str) -> Endpoint:
    """A free place to listen at, by ``unix`` or ``tcp``."""
    if transport == "tcp":
        return TcpEndpoint("127.0.0.1")
    return UnixEndpoint(make_socket_path())


class SupervisorEnd:
    """Use as ``async with SupervisorEnd(run) as listener``; all inputs stand in `inputs`, newest
    last."""

    def __init__(
        self,
        run: RunDirectory,
        leader: int = 1,
        nodes: tuple[str, ...] = ("node-1", "node-2"),
        transport: str = "unix",
    ) -> None:
        self.run, self.leader = run, leader
        self.inputs: list[Input] = []
        self.endpoint = make_endpoint(transport)
        self.server = AgentServer(
            self.endpoint, ensure_secret(run.secret), leader, nodes, self.inputs.append
        )

    async def __aenter__(self) -> "SupervisorEnd":
        self.endpoint = await self.server.start()
        publish(self.run.supervisor_address, Address(self.endpoint, self.leader))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.server.stop()
        remove_endpoint(self.endpoint)

    async def until(self, found: Callable[[], T | None], seconds: float = 60.0) -> T:
        """Wait until `found()` is true, and return it."""
        deadline = time.monotonic() + seconds
        while not (value := found()):
            assert time.monotonic() < deadline, (
                f"waited {seconds} s in vain; inputs: {self.inputs[-8:]}"
            )
            await asyncio.sleep(0.02)
        return value

    async def connected(self, node: str = "node-1") -> AgentConnected:
        await self.until(lambda: node in self.server.connected)
        return next(
            i for i in reversed(self.inputs) if isinstance(i, AgentConnected) and i.node == node
        )

    def facts(self, kind: type[T]) -> list[T]:
        """Facts of a kind, an agent's own or a rank's, in the order sent, each number once."""
        numbered = {i.number: i.fact for i in self.inputs if isinstance(i, FactReceived)}
        plain = [
            f.fact if isinstance(f, RankFact) and not issubclass(kind, RankFact) else f
            for f in numbered.values()
        ]
        return [f for f in plain if isinstance(f, kind)]

    def slot(self, slot: int = 0, node: str = "node-1") -> SlotState | None:
        """The slot as last reported."""
        for input_ in reversed(self.inputs):
            if isinstance(input_, HeartbeatReceived) and input_.node == node:
                return input_.heartbeat.slots[slot]
            if isinstance(input_, AgentConnected) and input_.node == node:
                return input_.state.slots[slot]
        return None

    async def fact(self, kind: type[T], seconds: float = 60.0) -> T:
        return await self.until(lambda: next(iter(self.facts(kind)), None), seconds)

    def acknowledge_all(self, node: str = "node-1") -> None:
        numbers = [i.number for i in self.inputs if isinstance(i, FactReceived)]
        self.server.send(node, Acknowledge(max(numbers)))


def play(scene: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(50):
            await scene

    asyncio.run(bounded())


async def leave(listener: SupervisorEnd, agent: Any, node: str = "node-1") -> None:
    listener.server.send(node, Leave("the test is over"))
    await listener.until(lambda: agent.poll() is not None)
    assert agent.returncode == 0


def config_of(run: RunDirectory, plan: str = "") -> RunConfig:
    """A configuration of one local node, for the shell."""
    return RunConfig(
        name=run.path.name,
        runs=str(run.path.parent),
        supervisor=SupervisorConfig(orphan_seconds=30.0, status_seconds=0.2),
        faults=FaultsConfig(plan=plan),
    )


def created() -> RunCreated:
    return RunCreated("run", 0, "tiny", 1, 10, 1)
