"""A run's whole world in virtual time, with the supervisor's real core and rules in it.

Theory of operation
===================

`World` is the host of `supervisor.core.Supervisor` (core.py says what a host owes it), and
everything around it is a model that keeps the contracts of opt_train/protocol and nothing more:
agents (node_agents.py), their links (links.py), ranks that train in lockstep (lockstep.py), the
scheduler (scheduler.py) and the shared file system (storage.py). `second` is one second of all of
them. Nothing here reads a clock or draws a number: a seed draws the faults (histories.py), and the
same faults at the same seconds give the same run.

Effects are carried out in order, and an `Append` that is not durable yet holds up all behind it,
while inputs go on to come: that is the shell's barrier. A supervisor may be killed between any two
effects (`lives`). What it had decided and not carried out never was; its successor folds the
journal, and agents tell it again what they keep.

What must hold whatever happens is asserted at every step (invariants.py).
"""

import random
from collections.abc import Callable
from typing import Any

from opt_logbook.record.events import Entry, Event, RunCreated
from opt_logbook.record.hardware import Offence

from opt_train.config.run_config import RunConfig
from opt_train.protocol.exits import STOPPED
from opt_train.protocol.facts import (
    ExitNotice,
    Heartbeat,
    LogLine,
    NodeFinding,
    RankExited,
    RankFact,
    ShardsSaved,
)
from opt_train.protocol.framing import Message
from opt_train.protocol.orders import Order
from opt_train.run.fold import fold
from opt_train.run.state import RunState
from opt_train.simulation import holds, invariants, links, machines
from opt_train.simulation.actors import (
    TAIL_FILE,
    WARM_SECONDS,
    Preflights,
    RankGroup,
    SimulatedAgent,
    SimulatedRank,
    SimulatedSlot,
    make_config,
)
from opt_train.simulation.data import SimulatedData
from opt_train.simulation.effect_queue import EffectQueue
from opt_train.simulation.lockstep import advance
from opt_train.simulation.node_agents import fetch
from opt_train.simulation.performance import perform
from opt_train.simulation.scheduler import Scheduler
from opt_train.simulation.storage import SharedStorage, Trail
from opt_train.supervisor.core import Supervisor
from opt_train.supervisor.effects import (
    Append,
    Effect,
    Finish,
)
from opt_train.supervisor.inputs import (
    AgentConnected,
    FactReceived,
    HeartbeatReceived,
    Identity,
    Input,
    Now,
    StopAsked,
    Tick,
)
from opt_train.supervisor.rules.context import Record
from opt_train.supervisor.rules.orders import order_given

Disaster = Callable[["World", random.Random], object]
"""What goes wrong at a second; the random numbers are the seed's."""


class World:
    """Nodes `n0`, `n1`, ...; the first `cluster.nodes` are meant to train."""

    def __init__(self, config: RunConfig | None = None) -> None:  # noqa: PLR0915 - its parts
        self.config = config or make_config()
        self.now = 1000.0
        count = self.config.cluster.nodes + self.config.cluster.buffer_nodes
        self.names = tuple(f"n{k}" for k in range(count))
        self.storage = SharedStorage()
        self.scheduler = Scheduler()
        self.core: Supervisor | None = None
        self.leaders = 0
        self.agents: dict[str, SimulatedAgent] = {}
        self.served: set[str] = set()
        """Nodes to whose agents the supervisor believes to have a link."""
        self.refuses_links = False
        """Nobody can dial in: the supervisor's host is cut off."""
        self.groups: dict[int, RankGroup] = {}
        self.node_disks: dict[str, dict[str, set[str]]] = {}
        """What agents wrote to their nodes' own disks: the next agent of the node finds it."""
        self.data = SimulatedData(self.config.train.global_batch)
        self.durations: dict[str, float] = {}
        """What every metrics line says of lengths: `step_seconds` and `data_seconds`."""
        self.slow: dict[str, float] = {}
        """Node -> how many times as long its ranks take over a step."""
        self.later: list[tuple[float, int, Input]] = []
        self.starting: list[tuple[float, str]] = []
        """When an agent that was asked for is there, and on which node."""
        self.queue: list[Input] = []
        self.lives: int | None = None
        """Effects until the supervisor dies; None: it does not."""
        self.finish: Finish | None = None
        self.effects: list[Effect] = []
        """Those that were carried out."""
        self.waiting = EffectQueue(self)
        self.snapshots_missed: dict[int, int] = {}
        """Step -> rank that takes no snapshot then."""
        self.snapshot_at_stop = False
        """Ranks that are asked to stop take a snapshot first, and are a while over their save."""
        self.wrong_value = ""
        """Of this value in force the last rank of every generation has another."""
        self.poison: tuple[int, str] | None = None
        """(step, log line): rank 0 crashes there, every time."""
        self.deaf = False
        """Ranks receive no orders."""
        self.heals = False
        """Whatever was lost looks well again at once, failed nodes too."""
        self.is_calm = False
        """Nothing goes wrong in it but a stop."""
        self.request: dict[str, Any] | None = None
        """To hold the run or to resume it, while it waits in the inbox."""
        self.resumed = False
        """A person has resumed the run, and starts it where it rests."""
        self.preflights = Preflights()
        self.offences: tuple[Offence, ...] = ()
        """What the site has on record of other runs."""
        self.shared_offences: tuple[Offence, ...] = ()
        """What it has of this one."""
        self.known = invariants.Known()
        self.planned: list[tuple[float, Disaster]] = []
        """Faults to come, with their seconds, in order."""
        self.begun: list[tuple[int, int, str]] = []
        """(generation, rank, node) of every rank that ever began."""
        self._pids = 100
        self._order = 0

    @property
    def journal(self) -> list[Entry]:
        return self.storage.journal

    @property
    def replayed(self) -> RunState:
        """What the journal folds to."""
        return self.storage.replayed

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
            offences=self.offences,
            **identity,
        )
        # Folded anew, as a new process does, though what it comes to is known.
        state = RunState()
        for entry in self.journal:
            state = fold(state, entry)
        assert state == self.replayed, "a journal folds to the same state whenever it is folded"
        now = self._clock()
        state, first = holds.journal_first(self, state, now.wall)
        self.core = Supervisor(self.config, state, known)
        self._forget_supervisor()
        self.waiting.queue([*map(Append, first), *self.core.begin(now)])

    def kill_supervisor(self) -> None:
        """Links end; what it had decided and not yet carried out never was."""
        self.core = None
        self._forget_supervisor()
        for agent in self.agents.values():
            agent.connected, agent.outgoing, agent.incoming = False, [], []

    def _forget_supervisor(self) -> None:
        self.lives = None
        self.waiting.clear()
        self.queue, self.later, self.starting = [], [], []
        self.served.clear()
        self.known.reported.clear()

    def feed(self, input_: Input) -> None:
        """One input, now."""
        if self.core is None:
            return
        if (
            isinstance(input_, FactReceived)
            and isinstance(input_.fact, RankFact)
            and isinstance(input_.fact.fact, ShardsSaved)
        ):
            self.known.reported.add((input_.fact.generation, invariants.path_of(input_.fact)))
        if isinstance(input_, AgentConnected):
            self.waiting.forget_sends(input_.node)
        effects = self.core.handle(input_, self._clock())
        self.waiting.queue(effects)
        journalled = any(isinstance(effect, Append) for effect in effects)
        if self.core is not None and self.waiting.is_empty and journalled:
            assert self.core.state == self.replayed, (
                "the live core stands where its journal folds to"
            )

    def _clock(self) -> Now:
        return Now(wall=1.7e9 + self.now, monotonic=self.now)

    def perform(self, effect: Effect) -> None:
        """Carry out one effect."""
        perform(self, effect)

    def answer(self, input_: Input) -> None:
        """The file system answers with `input_` when it can."""
        self._order += 1
        self.later.append((self.storage.answers_at(self.now), self._order, input_))

    def ask_for_agent(self, node: str) -> None:
        """The scheduler starts an agent there, some time."""
        invariants.check_start(self, node)
        self.starting.append((self.now + self.scheduler.start_seconds, node))
        self._start_due()

    def end(self, finish: Finish) -> None:
        """The shell's last act: agents leave, and the scheduler fences what stays."""
        invariants.check_finish(self, finish)
        self.finish = finish
        self.core = None
        self._forget_supervisor()
        for agent in list(self.agents.values()):
            machines.release(self, agent)

    @property
    def goes_on_by_itself(self) -> bool:
        """The run rests, and its supervisor takes it up again with other nodes."""
        done = self.finish
        return done is not None and done.code == STOPPED and self.replayed.goes_on_by_itself

    # Agents and ranks -----------------------------------------------------------------------------

    def start_agent(self, node: str) -> None:
        """A new process on the node, which finds what its disk has."""
        slots = [
            SimulatedSlot(self.now + WARM_SECONDS)
            for _ in range(self.config.cluster.slots_per_node)
        ]
        left = {path: set(names) for path, names in self.node_disks.get(node, {}).items()}
        self.agents[node] = SimulatedAgent(node, self.next_pid(), slots, self.now, held=left)
        self.scheduler.down.pop(node, None)

    def next_pid(self) -> int:
        """A process number that nobody has had."""
        self._pids += 1
        return self._pids

    def _start_due(self) -> None:
        due = [node for at, node in self.starting if at <= self.now]
        self.starting = [item for item in self.starting if item[0] > self.now]
        for node in due:
            if node not in self.agents and node not in self.scheduler.cut_since:
                self.start_agent(node)

    def ranks(self) -> list[SimulatedRank]:
        """Every rank that lives."""
        return [s.rank for a in self.agents.values() for s in a.slots if s.rank is not None]

    def living(self, generation: int) -> list[tuple[str, int]]:
        """Node and rank of those of `generation` that live."""
        return [
            (r.begin.node, r.begin.rank) for r in self.ranks() if r.begin.generation == generation
        ]

    def find(self, rank: int) -> tuple[SimulatedAgent, SimulatedSlot] | None:
        """Where `rank` of the newest generation runs."""
        newest = max((r.begin.generation for r in self.ranks()), default=0)
        for agent in self.agents.values():
            for slot in agent.slots:
                if slot.rank is None or slot.rank.begin.generation != newest:
                    continue
                if slot.rank.begin.rank == rank:
                    return agent, slot
        return None

    def report(self, agent: SimulatedAgent, fact: Message) -> None:
        """The agent numbers a fact, keeps it, and sends it if there is a link."""
        links.report(self, agent, fact)

    def report_of(self, agent: SimulatedAgent, rank: SimulatedRank, fact: Message) -> None:
        """The agent relays what its rank says."""
        begin = rank.begin
        links.report(self, agent, RankFact(begin.generation, begin.attempt, begin.rank, fact))

    def end_rank(
        self,
        agent: SimulatedAgent,
        slot: SimulatedSlot,
        code: int | None = None,
        signal: int | None = None,
        by_agent: bool = False,
        leaving: ExitNotice | None = None,
        tail: tuple[LogLine, ...] = (),
    ) -> None:
        """The rank's process is gone, and its agent reports it."""
        rank, slot.rank = slot.rank, None
        assert rank is not None
        begin = rank.begin
        exited = RankExited(
            begin.generation,
            begin.rank,
            begin.slot,
            rank.pid,
            code,
            signal,
            by_agent,
            leaving,
            rank.phase,
            rank.step,
            tail,
        )
        links.report(self, agent, exited)

    # What befalls them ----------------------------------------------------------------------------

    def publish_finding(self, node: str, cause: str, detail: str, permanent: bool = True) -> None:
        """A probe of the node's agent has found something."""
        agent = self.agents.get(node)
        if agent is not None:
            line = LogLine("", 0, f"NVRM: Xid: {detail}")
            links.report(self, agent, NodeFinding(cause, detail, permanent, 0.95, (line,)))

    def kill_rank(self, rank: int, code: int | None = None, text: str = "") -> None:
        """SIGKILL from outside, or an exit of its own with a line in its log."""
        found = self.find(rank)
        if found is None:
            return
        tail = (
            LogLine(TAIL_FILE, 7, "Traceback (most recent call last):"),
            LogLine(TAIL_FILE, 8, text),
        )
        signal = None if code is not None else 9
        self.end_rank(*found, code=code, signal=signal, tail=tail if text else ())

    def stop_rank(self, rank: int) -> None:
        """SIGSTOP."""
        found = self.find(rank)
        if found is not None and found[1].rank is not None:
            found[1].rank.stopped = True

    def lose_node(self, node: str, reason: str = "its agent is gone") -> None:
        """Agent and ranks die without a word."""
        machines.lose(self, node, reason)

    def cut_link(self, node: str, seconds: float) -> None:
        """Its link ends, for both ends to see, and no other is made for `seconds`."""
        if node in self.agents:
            links.cut(self, self.agents[node], seconds)

    @property
    def newest_trail(self) -> Trail | None:
        """What the newest ranks were last trained on."""
        return self.groups[max(self.groups)].trail if self.groups else None

    def plan(self, seconds: float, disaster: "Disaster") -> None:
        """Have it happen in `seconds`."""
        self.planned.append((self.now + seconds, disaster))
        self.planned.sort(key=lambda item: item[0])

    @property
    def is_held_up(self) -> bool:
        """Something is broken still that is to be waited for."""
        storage = self.storage
        return (
            self.core is None
            or self.refuses_links
            or not storage.takes_writes(self.now)
            or self.scheduler.is_away(self.now)
            or any(machines.is_cut_off(self, node) for node in self.agents)
        )

    # Time -----------------------------------------------------------------------------------------

    def second(self) -> None:
        """One second of everything."""
        self.now += 1.0
        # Links first: what is due by now was sent before anything of this second happened.
        self._start_due()
        for agent in list(self.agents.values()):
            links.deliver(self, agent)
            links.watch(self, agent)
            machines.watch_lease(self, agent)
        machines.heal(self)
        self._drain()
        for agent in list(self.agents.values()):
            self._fetch_due(agent)
        for group in list(self.groups.values()):
            advance(self, group)
        invariants.check_generations(self)
        self._drain()
        if self.core is not None:
            self.feed(self.scheduler.observe(self.names, self.now))
        for agent in list(self.agents.values()):
            heartbeat = Heartbeat(links.slots_of(self, agent))
            links.send_up(self, agent, HeartbeatReceived(agent.node, heartbeat))
        self._drain()
        # In the order in which they were asked for, whatever the file system did to them.
        due = sorted((i for i in self.later if i[0] <= self.now), key=lambda item: item[:2])
        self.later = [item for item in self.later if item[0] > self.now]
        self.queue += [input_ for _, _, input_ in due]
        self._drain()
        holds.deliver(self)
        self.feed(Tick())
        self._drain()

    def _fetch_due(self, agent: SimulatedAgent) -> None:
        due = [c for at, c in agent.fetching if at <= self.now and not agent.frozen]
        agent.fetching = [item for item in agent.fetching if item[1] not in due]
        for command in due:
            fetch(self, agent, command)

    def _drain(self) -> None:
        if self.core is not None:
            self.waiting.work()
        while self.queue and self.core is not None:
            self.feed(self.queue.pop(0))

    def run(self, seconds: int = 600) -> "World":
        """Until the supervisor is done; every run ends."""
        for _ in range(seconds):
            if self.finish is not None:
                return self
            self.second()
        raise AssertionError(f"no end after {seconds} s: {self.described()}")

    def until_step(self, step: int, seconds: int = 300) -> "World":
        """Until the newest generation has done `step`."""
        for _ in range(seconds):
            live = self.replayed.live
            group = self.groups.get(live.generation) if live else None
            if group is not None and group.step >= step and self.living(group.generation):
                return self
            assert self.finish is None, self.finish
            self.second()
        raise AssertionError(f"step {step} is not reached: {self.described()}")

    def until(self, kind: type[Event], count: int = 1, seconds: int = 300) -> "World":
        """Until `count` events of `kind` are journalled."""
        for _ in range(seconds):
            if len(self.events(kind)) >= count:
                return self
            self.second()
        raise AssertionError(f"no {kind.__name__}: {self.described()}")

    def give(self, *orders: Order) -> None:
        """Orders in the queue, as rules of the supervisor would give them."""
        assert self.core is not None
        for order in orders:
            self.waiting.queue(self.core._append(Record(order_given(order))))
        self._drain()

    def ask_stop(self, by: str = "a person") -> None:
        """Ask the supervisor to stop the run."""
        self.feed(StopAsked(by))
        self._drain()

    # What was journalled --------------------------------------------------------------------------

    def kinds(self) -> list[str]:
        """The kinds of all lines."""
        return [entry.event.kind for entry in self.journal]

    def events(self, kind: type[Any]) -> list[Any]:
        """The events of one kind."""
        return [entry.event for entry in self.journal if isinstance(entry.event, kind)]

    def entries(self, kind: type[Any]) -> list[Entry]:
        """The lines of one kind."""
        return [entry for entry in self.journal if isinstance(entry.event, kind)]

    def described(self) -> str:
        """Where the run is, for whoever reads a failure."""
        return f"{self.now - 1000:.0f} s, {self.replayed.stage}, {self.kinds()[-8:]}"
