"""A tiny world in virtual time for the supervisor's core: nodes, agents, ranks, a disk, a journal
that survives.

Agents and ranks are models that keep the contracts of opt_train/protocol and nothing more. The
journal here is what is durable: effects behind a supervisor's death are lost, entries in front of
it are not. `World` checks, at every step, what must hold whatever happens; a breach is an
AssertionError.
"""

import random
from typing import Any

from opt_logbook.record.codec import GENESIS, decode, encode
from opt_logbook.record.events import (
    AttemptEnded,
    CheckpointCommitted,
    Entry,
    Event,
    FindingNoted,
    NodeFailed,
    RunCreated,
    SaveAbandoned,
)

from opt_train.config.run_config import RunConfig
from opt_train.protocol.facts import (
    AgentState,
    ExitNotice,
    Heartbeat,
    LogLine,
    NodeFinding,
    RankExited,
    RankFact,
    ShardsSaved,
    SlotState,
    SnapshotFiles,
    SnapshotStored,
)
from opt_train.protocol.framing import Message
from opt_train.protocol.orders import Order
from opt_train.run.checkpoint import MEMORY, path_of_save
from opt_train.run.fold import fold
from opt_train.run.state import RunState
from opt_train.supervisor.core import Supervisor
from opt_train.supervisor.effects import (
    AcknowledgeFact,
    Append,
    ClearUncommitted,
    CommitManifest,
    CommitSnapshot,
    Effect,
    FenceNode,
    Finish,
    InspectCheckpoint,
    RetireCheckpoint,
    Send,
    StartAgent,
    WriteMetrics,
)
from opt_train.supervisor.inputs import (
    AgentConnected,
    AgentDisconnected,
    CheckpointInspected,
    ClusterObserved,
    FactReceived,
    HeartbeatReceived,
    Identity,
    Input,
    ManifestCommitted,
    Now,
    StopAsked,
    Tick,
)
from opt_train.supervisor.rules.context import Record
from opt_train.supervisor.rules.orders import order_given
from tests.supervisor.actors import TAIL_FILE, WARM_SECONDS, Agent, Group, Rank, Slot, make_config
from tests.supervisor.lockstep import advance
from tests.supervisor.node_agents import fetch, obey


class World:
    """Nodes `n0`, `n1`, ...; the first `cluster.nodes` are meant to train."""

    def __init__(self, config: RunConfig | None = None, seed: int = 0) -> None:
        self.config = config or make_config()
        self.random = random.Random(seed)
        self.now = 1000.0
        count = self.config.cluster.nodes + self.config.cluster.buffer_nodes
        self.names = tuple(f"n{k}" for k in range(count))
        self.journal: list[Entry] = []
        self.replayed = RunState()
        self.core: Supervisor | None = None
        self.leaders = 0
        self.agents: dict[str, Agent] = {}
        self.down: dict[str, str] = {}
        self.draining: dict[str, str] = {}
        self.groups: dict[int, Group] = {}
        self.disk: dict[str, str] = {}
        """Committed checkpoint -> what the supervisor finds wrong with it; empty: nothing."""
        self.flipped: dict[str, str] = {}
        """Committed checkpoint -> what its ranks find wrong when they read its bytes."""
        self.node_disks: dict[str, dict[str, set[str]]] = {}
        """What agents wrote to their nodes' own disks: the next agent of the node finds it."""
        self.metrics: dict[tuple[str, int], float] = {}
        self.durations: dict[str, float] = {}
        """What every metrics line says of lengths: `step_seconds` and `data_seconds`."""
        self.later: list[tuple[float, int, Input]] = []
        self.queue: list[Input] = []
        self.lives: int | None = None
        """Effects until the supervisor dies; None: it does not."""
        self.finish: Finish | None = None
        self.effects: list[Effect] = []
        self.fail_commits = 0
        """Commits that will fail; negative: saves of ranks that will."""
        self.snapshots_missed: dict[int, int] = {}
        """Step -> rank that takes no snapshot then."""
        self.snapshot_at_stop = False
        """Ranks that are asked to stop take a snapshot first, and are a while over their save."""
        self.wrong_value = ""
        """Of this value in force the last rank of every generation has another."""
        self.poison: tuple[int, str] | None = None
        """(step, log line): rank 0 crashes there, every time."""
        self.settled_saves: set[str] = set()
        self.reported_saves: set[tuple[int, str]] = set()
        """(generation, path) of reports that this supervisor received."""
        self.cleared: list[str] = []
        """Saves that were in no record and were removed."""
        self.ended: set[int] = set()
        self.failed_nodes: set[str] = set()
        self.begun: list[tuple[int, int, str]] = []
        self._pids = 100
        self._order = 0
        self.deaf = False
        """Ranks receive no orders."""

    # The supervisor -------------------------------------------------------------------------------

    def start_supervisor(self, config_sha256: str = "c0", **identity: Any) -> None:
        """Start one: it knows the journal and nothing else."""
        assert self.core is None
        self.finish = None
        self.leaders += 1
        created = RunCreated("run", 0, "tiny", 1000, self.config.train.steps, 8)
        known = Identity(
            leader=self.replayed.leader + 1,
            host="host",
            pid=self.leaders,
            version="0",
            run_directory="/run",
            config_path="/run/config.json",
            config_sha256=config_sha256,
            nodes=self.names,
            created=created,
            **identity,
        )
        state = RunState()
        for entry in self.journal:
            state = fold(state, entry)
        assert state == self.replayed, "a journal folds to the same state whenever it is folded"
        self.core = Supervisor(self.config, state, known)
        self.queue, self.later, self.reported_saves = [], [], set()
        self._carry_out(self.core.begin(self._clock()))

    def kill_supervisor(self) -> None:
        """Links end; what it had decided and not yet journalled never was."""
        self.core, self.lives, self.queue, self.later = None, None, [], []
        for agent in self.agents.values():
            agent.connected = False

    def feed(self, input_: Input) -> None:
        """One input, now."""
        if self.core is None:
            return
        if (
            isinstance(input_, FactReceived)
            and isinstance(input_.fact, RankFact)
            and isinstance(input_.fact.fact, ShardsSaved)
        ):
            self.reported_saves.add((input_.fact.generation, _path(input_.fact)))
        effects = self.core.handle(input_, self._clock())
        self._carry_out(effects)
        if self.core is not None and any(isinstance(e, Append) for e in effects):
            assert self.core.state == self.replayed, (
                "the live core stands where its journal folds to"
            )

    def _clock(self) -> Now:
        return Now(wall=1.7e9 + self.now, monotonic=self.now)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if self.lives is not None:
                if self.lives == 0:
                    self.kill_supervisor()
                    return
                self.lives -= 1
            self.effects.append(effect)
            self._do(effect)

    def _do(self, effect: Effect) -> None:  # noqa: PLR0912 - one case an effect
        match effect:
            case Append(entry):
                self._append(entry)
            case Send(node, command):
                agent = self.agents.get(node)
                if agent is not None and agent.connected and not agent.frozen:
                    obey(self, agent, command)
            case AcknowledgeFact(node, number):
                self._acknowledge(node, number)
            case StartAgent(node):
                if node not in self.agents and node not in self.failed_nodes:
                    self._start_agent(node)
            case FenceNode(node):
                self.lose_node(node, "fenced")
            case WriteMetrics(attempt, line):
                assert self.replayed.live is not None
                assert self.replayed.live.name == attempt, (
                    "metrics of an older generation are fenced off"
                )
                self.metrics[attempt, line["step"]] = line["loss"]
            case InspectCheckpoint(path):
                assert path in self.disk, f"{path} is wanted and not on the disk"
                self._answer(1.0, CheckpointInspected(path, self.disk[path], "sha"))
            case CommitManifest(path, _, attempt, step):
                why = ""
                if self.fail_commits:
                    self.fail_commits, why = self.fail_commits - 1, "No space left on device"
                else:
                    self.disk.setdefault(path, "")
                self._answer(1.0, ManifestCommitted(path, attempt, step, why, "sha", 10, 2, 0.1))
            case CommitSnapshot(paths, attempt, step, files):
                for path in paths:
                    self.disk.setdefault(path, "")
                size, ranks = 10 * len(files), len(files) - 1
                self._answer(
                    1.0,
                    ManifestCommitted(
                        paths[0],
                        attempt,
                        step,
                        "",
                        "sha",
                        size,
                        len(files),
                        0.1,
                        world_size=ranks,
                        config_sha256="c0",
                    ),
                )
            case RetireCheckpoint(path):
                chain = [c for c in self.replayed.chain() if not c.rejected]
                assert path not in [c.path for c in chain if not c.is_with_agents][-2:]
                self.disk.pop(path, None)
            case ClearUncommitted(attempts, kept):
                assert kept >= {c.path for c in self.replayed.checkpoints}, (
                    "what is on record stays"
                )
                assert not self.ranks(), "somebody may still be saving"
                self.cleared += [
                    p for p in self.disk if p.split("/")[1] in attempts and p not in kept
                ]
                self.disk = {
                    path: why for path, why in self.disk.items() if path not in self.cleared
                }
            case Finish():
                self.finish = effect
                self.core = None
                self.agents.clear()
            case _:
                pass

    def _answer(self, seconds: float, input_: Input) -> None:
        self._order += 1
        self.later.append((self.now + seconds, self._order, input_))

    def _append(self, entry: Entry) -> None:
        # As a new supervisor reads it, who stands where this one does only if the line carries all
        # that it goes by.
        previous = self.journal[-1].hash if self.journal else GENESIS
        entry = decode(encode(entry, len(self.journal) + 1, previous))
        self.journal.append(entry)
        self.replayed = fold(self.replayed, entry)
        match entry.event:
            case CheckpointCommitted(path):
                assert path not in self.settled_saves, f"{path} is committed once"
                assert path in self.disk, "what is journalled as committed is there"
                self.settled_saves.add(path)
            case SaveAbandoned(path):
                self.settled_saves.add(path)
            case AttemptEnded(generation):
                self.ended.add(generation)
                open_saves = {
                    path for g, path in self.reported_saves if g == generation
                } - self.settled_saves
                assert not open_saves, (
                    f"nothing was said of {open_saves} before generation {generation} ended"
                )
                left = self.living(generation)
                assert not left, f"generation {generation} ends while ranks of it live: {left}"
            case NodeFailed(node):
                self.failed_nodes.add(node)

    def _acknowledge(self, node: str, number: int) -> None:
        agent = self.agents.get(node)
        if agent is None or not agent.connected:
            return
        for known in [n for n in agent.kept if n <= number]:
            fact = agent.kept.pop(known)
            generation = getattr(fact, "generation", 0)
            old = generation in self.ended
            if isinstance(fact, RankExited):
                assert old, (
                    f"the end of a rank of generation {generation} is forgotten before it is "
                    "journalled"
                )
            if isinstance(fact, RankFact) and isinstance(fact.fact, ShardsSaved):
                path = _path(fact)
                assert old or path in self.settled_saves, (
                    f"{path} is forgotten before its fate is journalled"
                )
            if isinstance(fact, NodeFinding):
                noted = [(e.node, e.cause, e.detail) for e in self.events(FindingNoted)]
                assert (node, fact.cause, fact.detail) in noted, (
                    f"{fact} of {node} is forgotten before it is journalled"
                )
            if isinstance(fact, SnapshotStored):
                path = path_of_save(fact.attempt, fact.step, MEMORY)
                assert old or path in self.settled_saves, (
                    f"{path} is forgotten before its fate is journalled"
                )

    # Agents ---------------------------------------------------------------------------------------

    def _start_agent(self, node: str) -> None:
        self._pids += 1
        slots = [Slot(self.now + WARM_SECONDS) for _ in range(self.config.cluster.slots_per_node)]
        left = {path: set(names) for path, names in self.node_disks.get(node, {}).items()}
        self.agents[node] = Agent(node, self._pids, slots, self.now, held=left)
        self.down.pop(node, None)

    def next_pid(self) -> int:
        """A process number that nobody has had."""
        self._pids += 1
        return self._pids

    def report(self, agent: Agent, fact: Message) -> None:
        agent.number += 1
        agent.kept[agent.number] = fact
        if agent.connected and not agent.frozen:
            self.queue.append(FactReceived(agent.node, agent.number, fact))

    def report_of(self, agent: Agent, rank: Rank, fact: Message) -> None:
        self.report(
            agent, RankFact(rank.begin.generation, rank.begin.attempt, rank.begin.rank, fact)
        )

    def _slots(self, agent: Agent) -> tuple[SlotState, ...]:
        slots = []
        for number, slot in enumerate(agent.slots):
            warm = slot.warm_at <= self.now
            rank = slot.rank
            if rank is None:
                slots.append(SlotState(number, "warm" if warm else "warming", spare=warm))
                continue
            slots.append(
                SlotState(
                    number,
                    "running",
                    warm,
                    rank.pid,
                    rank.begin.generation,
                    rank.begin.attempt,
                    rank.begin.rank,
                    rank.phase,
                    rank.step,
                    self.now - rank.since,
                    "T" if rank.stopped else "S",
                )
            )
        return tuple(slots)

    def _connect(self, agent: Agent) -> None:
        agent.connected, agent.led_at = True, self.now
        held = tuple(
            SnapshotFiles(path, tuple(sorted(names))) for path, names in agent.held.items()
        )
        assert self.core is not None
        agent.first_leader = agent.first_leader or self.core.identity.leader
        state = AgentState(
            agent.node,
            agent.pid,
            self._slots(agent),
            held=held,
            address=agent.node,
            first_leader=agent.first_leader,
        )
        self.queue.append(AgentConnected(agent.node, state))
        self.queue += [
            FactReceived(agent.node, number, fact) for number, fact in agent.kept.items()
        ]

    # Ranks ----------------------------------------------------------------------------------------

    def ranks(self) -> list[Rank]:
        return [s.rank for a in self.agents.values() for s in a.slots if s.rank is not None]

    def living(self, generation: int) -> list[tuple[str, int]]:
        return [
            (r.begin.node, r.begin.rank) for r in self.ranks() if r.begin.generation == generation
        ]

    def find(self, rank: int) -> tuple[Agent, Slot] | None:
        """Where `rank` of the newest generation runs."""
        newest = max((r.begin.generation for r in self.ranks()), default=0)
        for agent in self.agents.values():
            for slot in agent.slots:
                if slot.rank and (slot.rank.begin.generation, slot.rank.begin.rank) == (
                    newest,
                    rank,
                ):
                    return agent, slot
        return None

    def end_rank(
        self,
        agent: Agent,
        slot: Slot,
        code: int | None = None,
        signal: int | None = None,
        by_agent: bool = False,
        leaving: ExitNotice | None = None,
        tail: tuple[LogLine, ...] = (),
    ) -> None:
        rank, slot.rank = slot.rank, None
        assert rank is not None
        self.report(
            agent,
            RankExited(
                rank.begin.generation,
                rank.begin.rank,
                rank.begin.slot,
                rank.pid,
                code,
                signal,
                by_agent,
                leaving,
                rank.phase,
                rank.step,
                tail,
            ),
        )

    # Faults ---------------------------------------------------------------------------------------

    def publish_finding(self, node: str, cause: str, detail: str, permanent: bool = True) -> None:
        """A probe of the node's agent has found something."""
        agent = self.agents.get(node)
        if agent is not None:
            line = LogLine("", 0, f"NVRM: Xid: {detail}")
            self.report(agent, NodeFinding(cause, detail, permanent, 0.95, (line,)))

    def kill_rank(self, rank: int, code: int | None = None, text: str = "") -> None:
        """SIGKILL from outside, or an exit of its own with a line in its log."""
        found = self.find(rank)
        if found is not None:
            tail = (
                LogLine(TAIL_FILE, 7, "Traceback (most recent call last):"),
                LogLine(TAIL_FILE, 8, text),
            )
            self.end_rank(
                *found, code=code, signal=None if code is not None else 9, tail=tail if text else ()
            )

    def stop_rank(self, rank: int) -> None:
        found = self.find(rank)
        if found is not None and found[1].rank is not None:
            found[1].rank.stopped = True

    def lose_node(self, node: str, reason: str = "its agent is gone") -> None:
        """Agent and ranks die without a word."""
        agent = self.agents.pop(node, None)
        self.down[node] = reason
        if agent is not None and agent.connected:
            self.queue.append(AgentDisconnected(node))

    def cut_link(self, node: str, seconds: float) -> None:
        agent = self.agents.get(node)
        if agent is not None:
            agent.link_until = self.now + seconds
            if agent.connected:
                agent.connected = False
                self.queue.append(AgentDisconnected(node))

    # Time -----------------------------------------------------------------------------------------

    def second(self) -> None:
        """One second of everything."""
        self.now += 1.0
        for agent in list(self.agents.values()):
            if (
                not agent.connected
                and self.core is not None
                and agent.link_until <= self.now
                and not agent.frozen
            ):
                self._connect(agent)
            if agent.connected:
                agent.led_at = self.now
            elif self.now - agent.led_at > self.config.supervisor.orphan_seconds:
                self.lose_node(agent.node, "its agent left: nobody led it")
        self._drain()
        for agent in list(self.agents.values()):
            due_now = [
                command for at, command in agent.fetching if at <= self.now and not agent.frozen
            ]
            agent.fetching = [item for item in agent.fetching if item[1] not in due_now]
            for command in due_now:
                fetch(self, agent, command)
        for group in list(self.groups.values()):
            advance(self, group)
        self._drain()
        if self.core is not None:
            states = {node: "down" if node in self.down else "up" for node in self.names}
            self.feed(ClusterObserved(states, dict(self.down), dict(self.draining)))
        for agent in list(self.agents.values()):
            if agent.connected and not agent.frozen:
                self.feed(HeartbeatReceived(agent.node, Heartbeat(self._slots(agent))))
        due = [item for item in self.later if item[0] <= self.now]
        self.later = [item for item in self.later if item[0] > self.now]
        self.queue += [input_ for _, _, input_ in sorted(due, key=lambda item: item[:2])]
        self._drain()
        self.feed(Tick())
        self._drain()

    def _drain(self) -> None:
        while self.queue and self.core is not None:
            self.feed(self.queue.pop(0))

    def run(self, seconds: int = 600) -> "World":
        """Until the supervisor is done; every run ends."""
        for _ in range(seconds):
            if self.finish is not None:
                return self
            self.second()
        raise AssertionError(
            f"no end after {seconds} s: {self.replayed.stage}, {self.kinds()[-8:]}"
        )

    def until_step(self, step: int, seconds: int = 300) -> "World":
        """Until the newest generation has done `step`."""
        for _ in range(seconds):
            live = self.replayed.live
            group = self.groups.get(live.generation) if live else None
            if group is not None and group.step >= step and self.living(group.generation):
                return self
            assert self.finish is None, self.finish
            self.second()
        raise AssertionError(
            f"step {step} is not reached: {self.replayed.stage}, {self.kinds()[-8:]}"
        )

    def until(self, kind: type[Event], count: int = 1, seconds: int = 300) -> "World":
        """Until `count` events of `kind` are journalled."""
        for _ in range(seconds):
            if len(self.events(kind)) >= count:
                return self
            self.second()
        raise AssertionError(f"no {kind.__name__}: {self.replayed.stage}, {self.kinds()[-8:]}")

    def give(self, *orders: Order) -> None:
        """Orders in the queue, as rules of the supervisor would give them."""
        assert self.core is not None
        for order in orders:
            self._carry_out(self.core._append(Record(order_given(order))))
        self._drain()

    def ask_stop(self, by: str = "a person") -> None:
        self.feed(StopAsked(by))
        self._drain()

    # What was journalled --------------------------------------------------------------------------

    def kinds(self) -> list[str]:
        return [entry.event.kind for entry in self.journal]

    def events(self, kind: type[Any]) -> list[Any]:
        return [entry.event for entry in self.journal if isinstance(entry.event, kind)]

    def entries(self, kind: type[Any]) -> list[Entry]:
        return [entry for entry in self.journal if isinstance(entry.event, kind)]


def _path(fact: RankFact) -> str:
    step: int = getattr(fact.fact, "step", -1)
    return f"checkpoints/{fact.attempt}/step-{step:08d}"
