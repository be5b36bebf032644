"""What a supervisor of many nodes costs: `python benchmarks/supervisor_scale.py`.

The real core, rules and messages; then the real agent server and its handshakes over TCP. Agents
are stand-ins in a process of their own that send what agents send; nothing trains, and nothing is
written. It prints seconds by kind of input, how long all agents take to dial in when a supervisor
comes back, the share of a core that steady training takes, and the memory.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import resource
import secrets
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from opt_logbook.record.events import RunCreated

from opt_train.checkpoint.config import CheckpointConfig
from opt_train.clusters.config import ClusterConfig
from opt_train.config.run_config import RunConfig
from opt_train.link.connection import Connection, LinkRefused
from opt_train.link.endpoint import TcpEndpoint, dial, parse_endpoint
from opt_train.link.handshake import prove_agent
from opt_train.optim.in_force import in_force
from opt_train.protocol.facts import (
    AgentState,
    Heartbeat,
    InForce,
    RankFact,
    SavedFile,
    ShardsSaved,
    SlotState,
    Store,
)
from opt_train.protocol.framing import from_line, to_line
from opt_train.run.state import RunState, Stage
from opt_train.supervisor.core import Supervisor
from opt_train.supervisor.effects import Send
from opt_train.supervisor.inputs import (
    AgentConnected,
    ClusterObserved,
    FactReceived,
    HeartbeatReceived,
    Identity,
    Input,
    ManifestCommitted,
    MetricsReceived,
    Now,
    Tick,
)
from opt_train.supervisor.shell.agent_server import AgentServer
from opt_train.train.config import TrainConfig

TICKS_A_SECOND = 5


class ScaledRun:
    """A run of many nodes whose every input is timed."""

    def __init__(self, nodes: int, slots: int) -> None:
        self.slots = slots
        cluster = ClusterConfig(nodes=nodes, buffer_nodes=16, slots_per_node=slots)
        self.config = RunConfig(
            cluster=cluster,
            train=TrainConfig(steps=10**6, global_batch=nodes * slots),
            checkpoint=CheckpointConfig(every_steps=1000),
        )
        self.names = tuple(f"node-{k:05d}" for k in range(nodes + 16))
        self.training = self.names[:nodes]
        self.places = {node: place for place, node in enumerate(self.training)}
        self.identity = Identity(
            1,
            "host",
            1,
            "0",
            "/run",
            "/run/config.json",
            "c0",
            self.names,
            RunCreated("run", 0, "tiny", 1000, 10**6, 8),
        )
        self.core = Supervisor(self.config, RunState(), self.identity)
        self.now = 1000.0
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.numbers: dict[str, int] = defaultdict(int)
        self.core.begin(self._clock())

    def _clock(self) -> Now:
        return Now(1.7e9 + self.now, self.now)

    def feed(self, kind: str, input_: Input) -> None:
        began = time.process_time()
        self.core.handle(input_, self._clock())
        self.seconds[kind].append(time.process_time() - began)

    def succeed(self) -> None:
        """The supervisor has died: the next one folds the journal, and knows no agent yet."""
        self.core = Supervisor(self.config, self.core.state, replace(self.identity, leader=2))
        self.core.begin(Now(time.time(), time.monotonic()))

    def fact(self, kind: str, node: str, rank: int, fact: object) -> None:
        self.numbers[node] += 1
        relayed = RankFact(1, "1.00", rank, fact)  # type: ignore[arg-type]
        self.feed(kind, FactReceived(node, self.numbers[node], relayed))

    def warm(self, node: str) -> tuple[SlotState, ...]:
        return tuple(SlotState(k, "warm", spare=True) for k in range(self.slots))

    def running(self, node: str, step: int) -> tuple[SlotState, ...]:
        return running(self.places[node], self.slots, step)

    def until_training(self) -> None:
        """All agents dial in, all ranks begin, and the first step is done."""
        for node in self.names:
            state = AgentState(node, 1, self.warm(node), address="10.0.0.1:1")
            self.feed("agent dials in", AgentConnected(node, state))
            self.feed("heartbeat before", HeartbeatReceived(node, Heartbeat(self.warm(node))))
        self.observe()
        self.now += 1.0
        self.feed("tick that starts", Tick())
        assert self.core.state.stage is Stage.STARTING, self.core.state.stage
        self.fact("store", self.training[0], 0, Store("10.0.0.1", 7000))
        self.beat(0)
        values = in_force(self.config, (), 0)
        for place, node in enumerate(self.training):
            for slot in range(self.slots):
                self.fact("in force", node, place * self.slots + slot, InForce(values))
        self.step(1)
        assert self.core.state.stage is Stage.TRAINING, self.core.state.stage

    def observe(self) -> None:
        self.feed("cluster observed", ClusterObserved(dict.fromkeys(self.names, "up"), {}))

    def beat(self, step: int) -> None:
        for node in self.training:
            beat = Heartbeat(self.running(node, step))
            self.feed("heartbeat", HeartbeatReceived(node, beat))

    def step(self, step: int) -> None:
        self.feed("metrics line", MetricsReceived(self.training[0], 1, metrics_line(step)))

    def second(self, step: int) -> None:
        """One second of steady training, without heartbeats."""
        for _ in range(TICKS_A_SECOND):
            self.now += 1 / TICKS_A_SECOND
            self.feed("tick", Tick())
        self.observe()
        self.step(step)

    def save(self, step: int) -> None:
        path = f"checkpoints/1.00/step-{step:08d}"
        for place, node in enumerate(self.training):
            for slot in range(self.slots):
                rank = place * self.slots + slot
                files = (SavedFile(f"shard-{rank:05d}.safetensors", 10, "0" * 64),)
                saved = ShardsSaved(step, f"/run/{path}", files, 1.0)
                self.fact("shards saved", node, rank, saved)
        committed = ManifestCommitted(path, "1.00", step, "", "sha", 10, 2, 0.1)
        self.feed("manifest committed", committed)


class LinkedRun:
    """The run's agents over TCP: the real server on this side, stand-ins in a process of their
    own."""

    def __init__(self, run: ScaledRun) -> None:
        self._run, self._arrived = run, list[Input]()
        self._secret = secrets.token_bytes(32)
        lease_seconds = run.config.cluster.heartbeat_seconds
        self._server = AgentServer(
            TcpEndpoint("127.0.0.1"), self._secret, 2, run.names, self._feed, lease_seconds
        )

    def _feed(self, input_: Input) -> None:
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._decide)
        self._arrived.append(input_)

    def _decide(self) -> None:
        inputs, self._arrived = self._arrived, []
        for effect in self._run.core.handle_all(inputs, Now(time.time(), time.monotonic())):
            if isinstance(effect, Send):
                self._server.send(effect.node, effect.command)

    async def measure(self, seconds: float) -> tuple[float, float, float]:
        """Seconds until all agents have dialled in, CPU seconds of this process meanwhile, and the
        share of a core that steady training takes then."""
        bound = await self._server.start()
        heartbeat = self._run.config.cluster.heartbeat_seconds
        agents = multiprocessing.get_context("spawn").Process(
            target=run_agents,
            args=(str(bound), self._secret, len(self._run.training), self._run.slots, heartbeat),
        )
        agents.start()
        try:
            while not self._server.connected:
                await asyncio.sleep(0.01)
            began, cpu = time.monotonic(), time.process_time()
            # Adopted: every agent is connected, and every rank accounted for.
            while self._run.core.state.live is None or self._run.core.state.live.leader != 2:
                await asyncio.sleep(0.01)
            joined, joined_cpu = time.monotonic() - began, time.process_time() - cpu
            await asyncio.sleep(2 * heartbeat)
            began, cpu = time.monotonic(), time.process_time()
            step = self._run.core.view.training.history.step
            while time.monotonic() - began < seconds:
                step += 1
                await self._second(step)
            share = (time.process_time() - cpu) / (time.monotonic() - began)
            assert len(self._server.connected) == len(self._run.training), "agents were lost"
            return joined, joined_cpu, share
        finally:
            agents.terminate()
            agents.join()
            await self._server.stop()

    async def _second(self, step: int) -> None:
        self._feed(ClusterObserved(dict.fromkeys(self._run.names, "up"), {}))
        self._feed(MetricsReceived(self._run.training[0], 1, metrics_line(step)))
        for _ in range(TICKS_A_SECOND):
            self._feed(Tick())
            await asyncio.sleep(1 / TICKS_A_SECOND)


def run_agents(endpoint: str, secret: bytes, nodes: int, slots: int, seconds: float) -> None:
    """Stand-ins for `nodes` agents whose ranks train; they dial in at once."""

    async def agent(place: int) -> None:
        name = f"node-{place:05d}"
        while True:
            connection = Connection(*await dial(parse_endpoint(endpoint), 30))
            try:
                await prove_agent(connection, secret, name, 0)
                break
            except LinkRefused:
                await asyncio.sleep(0.5)
        connection.send(AgentState(name, 1, running(place, slots, 1), address="10.0.0.1:1"))
        reading = asyncio.create_task(read(connection))
        for step in itertools.count(1):
            connection.send(Heartbeat(running(place, slots, step)))
            await asyncio.sleep(seconds)
        await reading

    async def read(connection: Connection) -> None:
        while True:
            await connection.receive(60)

    async def all_agents() -> None:
        await asyncio.gather(*(agent(place) for place in range(nodes)))

    asyncio.run(all_agents())


def running(place: int, slots: int, step: int) -> tuple[SlotState, ...]:
    """The slots of the node at `place`, in all of which ranks train."""
    return tuple(
        SlotState(k, "running", True, 100 + k, 1, "1.00", place * slots + k, "step", step, 0.5, "S")
        for k in range(slots)
    )


def metrics_line(step: int) -> dict[str, float]:
    """As large as that of a model of 96 layers."""
    line = {"step": step, "loss": 5.0, "tokens": 8 * step, "step_seconds": 4.0}
    return line | {f"layer_{k}_norm": 1.0 for k in range(96)}


def line_seconds(make: Callable[[], object], repeat: int = 300) -> tuple[float, float]:
    """Seconds to write and to read one line."""
    message = make()
    began = time.process_time()
    for _ in range(repeat):
        line = to_line(message)
    written = time.process_time()
    for _ in range(repeat):
        from_line(line)
    return (written - began) / repeat, (time.process_time() - written) / repeat


def resident_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=20, help="of steady training")
    parser.add_argument("--no-links", action="store_true", help="the core alone")
    parser.add_argument("--quick", action="store_true", help="few nodes: whether it runs")
    asked = parser.parse_args()
    if asked.quick:
        asked.nodes, asked.seconds = 20, 1
    before = resident_megabytes()
    run = ScaledRun(asked.nodes, asked.slots)
    run.until_training()
    for second in range(asked.seconds):
        run.second(second + 2)
    run.beat(asked.seconds)
    run.save(1000)
    run.save(2000)
    print(f"{asked.nodes} nodes of {asked.slots}: {asked.nodes * asked.slots} ranks")
    print(f"{'input':20} {'how many':>8} {'mean ms':>9} {'median ms':>9} {'most ms':>9}")
    for kind, seconds in run.seconds.items():
        mean, median = statistics.fmean(seconds), statistics.median(seconds)
        print(
            f"{kind:20} {len(seconds):8} {1000 * mean:9.3f} {1000 * median:9.3f} "
            f"{1000 * max(seconds):9.3f}"
        )
    written, read = line_seconds(lambda: Heartbeat(run.running(run.training[0], 7)))
    print(f"a heartbeat's line: {1000 * written:.3f} ms to write, {1000 * read:.3f} ms to read")
    if not asked.no_links:
        run.succeed()
        joined, joined_cpu, share = asyncio.run(LinkedRun(run).measure(asked.seconds))
        print(f"all agents dial in, by TCP: {joined:.1f} s, {joined_cpu:.1f} s of CPU")
        print(f"steady training: {100 * share:.1f} % of a core")
    print(f"memory: {resident_megabytes():.0f} MB, {before:.0f} MB of them before the run")


if __name__ == "__main__":
    main()
