"""What the supervisor sees and hears but does not journal: connections, pulses, facts not yet
settled, metrics.

Not state: it begins empty with each supervisor, and the agents tell it anew. Nothing here decides
anything.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_train.protocol.commands import Begin, Drop, Fetch, Kill
from opt_train.protocol.exits import DONE, STOPPED
from opt_train.protocol.facts import (
    AgentState,
    ExitNotice,
    Fetched,
    GenerationGone,
    InForce,
    OrderObeyed,
    RankExited,
    RankFact,
    SaveFailed,
    ShardsSaved,
    SlotState,
    SnapshotHeld,
    Stacks,
    Store,
    Validation,
)
from opt_train.protocol.framing import Message
from opt_train.run.checkpoint import path_of_save
from opt_train.run.state import RunState, Stage
from opt_train.supervisor.config import SupervisorConfig
from opt_train.supervisor.effects import (
    AcknowledgeFact,
    CommitManifest,
    CommitSnapshot,
    Effect,
    FenceNode,
    Finish,
    Send,
    Show,
    VerifyCheckpoint,
)
from opt_train.supervisor.inputs import (
    AgentConnected,
    AgentDisconnected,
    CheckpointVerified,
    ClusterObserved,
    FactReceived,
    HeartbeatReceived,
    Input,
    ManifestCommitted,
    MetricsReceived,
    Now,
    StopAsked,
    Tick,
)
from opt_train.supervisor.phase_timeouts import FIRST_STEPS, PhaseTimeouts
from opt_train.supervisor.snapshot_inventory import Inventory

STOP_ECHO_SECONDS = 2.0
"""A Ctrl-C this soon after another is the same one: a nervous finger must not cost the state."""
PULSE_GAP_SECONDS = 3.0
"""Pulses come every second; across a longer gap the length of a phase is not known."""


@dataclass(slots=True)
class NodeView:
    """One node as it looks from here. Times are monotonic seconds."""

    silent_since: float
    """When its connection ended, or when this supervisor began."""
    connected: bool = False
    connected_at: float = 0.0
    connections: int = 0
    caught_up: bool = False
    """A pulse has come on this connection: facts that the agent keeps are told before it, so none
    is outstanding."""
    pid: int = 0
    first_leader: int = 0
    """The supervisor that its agent obeyed first."""
    slots: dict[int, SlotState] = field(default_factory=dict)
    slots_at: float = 0.0
    absent_since: dict[int, float] = field(default_factory=dict)
    """Slot -> since when no rank runs in it."""
    lost_generation: int = -1
    """Its agent was replaced by another one: ranks up to this generation died with it unless they
    are seen."""
    gone_generation: int = -1
    """No rank of a generation up to this one lives here."""
    cluster: str = "unknown"
    cluster_reason: str = ""
    down_since: float = 0.0
    fenced_unreached: bool = False
    """Fenced because it did not answer, while the cluster did not call it down: down by our own
    hand, then."""
    seen_up: bool = False
    facts: dict[int, Message] = field(default_factory=dict)
    """Told and not yet acknowledged, by number, in order."""
    acknowledged: int = 0
    retold: bool = False
    """An acknowledged fact came again: the acknowledgement was lost."""

    def disconnect(self, at: float) -> None:
        if self.connected:
            self.connected, self.silent_since = False, at


class ClusterView:
    """All of it. `take` hears an input; `note` remembers what was asked of the shell."""

    def __init__(self, config: SupervisorConfig, now: Now) -> None:
        self.now = now
        self.began = now.monotonic
        self.watching = False
        """This input is a tick on which the slow watches look, once a second."""
        self._watched_at = float("-inf")
        self.pending: set[str] = set()
        """Nodes with facts that are not acknowledged, or whose acknowledgement was lost."""
        self.nodes: dict[str, NodeView] = {}
        self.timeouts = PhaseTimeouts(config)
        self.highest_generation = 0
        self.stage_since = now.monotonic
        self.stops = 0
        self._stopped_at = float("-inf")
        self.order_since = now.monotonic
        self.finished = False
        self.moved_at = now.monotonic
        """When training was last seen to move."""
        self.step = -1
        """Steps known to be done in the current attempt; -1: none."""
        self.line: Mapping[str, Any] = {}
        """The newest metrics line of the current attempt."""
        self.last_line: Mapping[str, Any] = {}
        """The newest metrics line of any attempt."""
        self.stores: dict[int, Store] = {}
        self.in_force: dict[int, dict[int, Mapping[str, Any]]] = {}
        self.exits: dict[int, dict[int, tuple[str, RankExited]]] = {}
        self.deaths: dict[int, dict[int, tuple[str, RankExited]]] = {}
        """Those of `exits` that no rank announced."""
        self.leavings: dict[int, dict[int, ExitNotice]] = {}
        self.stacks: dict[int, dict[int, tuple[str, Stacks]]] = {}
        self.shards: dict[tuple[int, int], dict[int, ShardsSaved]] = {}
        self.failed_saves: dict[tuple[int, int], tuple[int, str]] = {}
        """(generation, step) -> (rank, reason)."""
        self.obeyed: dict[int, int] = {}
        self.validations: dict[tuple[int, str, int], Validation] = {}
        self.seen_running: set[tuple[int, int]] = set()
        """(generation, rank) seen in a slot."""
        self.begun: set[tuple[int, int]] = set()
        """(generation, rank) that were told to begin."""
        self.kill_asked: dict[tuple[str, int], float] = {}
        """(node, generation) -> when its agent was first told to kill it."""
        self.committing: dict[str, float] = {}
        self.committed: dict[str, ManifestCommitted] = {}
        self.verified: dict[str, CheckpointVerified] = {}
        self.inventory = Inventory()
        self.dialled: set[str] = set()
        """Nodes that dialled in with the input at hand."""
        self.shown: Show | None = None
        self.shown_at = float("-inf")
        self._sent: dict[tuple[str, ...], float] = {}

    def view(self, node: str) -> NodeView:
        if node not in self.nodes:
            self.nodes[node] = NodeView(silent_since=self.began)
        return self.nodes[node]

    def age(self, since: float) -> float:
        """Seconds from `since` (monotonic) until now."""
        return self.now.monotonic - since

    def is_down(self, node: str) -> bool:
        """The cluster says the node is gone, and it does not answer.

        Right after a start the cluster may not have seen the agent it was just asked for.
        """
        view = self.nodes.get(node)
        if view is None or view.connected or view.cluster != "down":
            return False
        return view.seen_up or self.age(view.down_since) >= DOWN_BEFORE_UP_SECONDS

    def was_sent(self, *key: str, within: float) -> bool:
        """Whether what `key` names was asked of the shell in the last `within` seconds."""
        return self.age(self._sent.get(key, float("-inf"))) < within

    # Hearing --------------------------------------------------------------------------------------

    def take(self, given: Input, now: Now, state: RunState) -> None:
        """Hear `given`. Whatever is told twice is heard once."""
        self.now = now
        self.watching = (
            isinstance(given, Tick) and now.monotonic - self._watched_at >= WATCH_SECONDS
        )
        if self.watching:
            self._watched_at = now.monotonic
        match given:
            case HeartbeatReceived(node, pulse):
                self.view(node).caught_up = True
                self._take_slots(self.view(node), pulse.slots, state)
            case FactReceived():
                self._take_fact(given, state)
            case MetricsReceived():
                self._take_metrics(given, state)
            case ClusterObserved():
                self._take_cluster(given)
            case AgentConnected(node, told):
                self.dialled.add(node)
                self.inventory.take_connection(node, told)
                self._take_connection(self.view(node), told, state)
            case AgentDisconnected(node):
                self.view(node).disconnect(now.monotonic)
            case CheckpointVerified(path):
                self.verified[path] = given
            case ManifestCommitted(path):
                self.committing.pop(path, None)
                self.committed[path] = given
                self.inventory.take_committed(given)
            case StopAsked():
                # Nor does a scheduler's signal hurry. It repeats it: `scancel` reaches the
                # supervisor and the launch script, which hands its own on, and the time limit sends
                # a second one while a long save goes on.
                if (
                    given.by not in ("SIGTERM", "SIGUSR1")
                    and self.age(self._stopped_at) > STOP_ECHO_SECONDS
                ):
                    self.stops += 1
                    self._stopped_at = now.monotonic
            case _:
                pass

    def _take_connection(self, view: NodeView, told: AgentState, state: RunState) -> None:
        if view.pid != told.pid:
            if view.pid:
                view.lost_generation = state.generation
            view.pid, view.facts, view.acknowledged = told.pid, {}, 0
            view.first_leader = told.first_leader
        view.connected, view.seen_up, view.fenced_unreached = True, True, False
        view.connected_at = self.now.monotonic
        view.connections += 1
        view.caught_up = view.retold = False
        self._take_slots(view, told.slots, state)
        # Nothing was sent on this connection yet, so what does not run now will not, unless it is
        # begun again.
        alive = [s.generation for s in told.slots if s.stage == "running"]
        view.gone_generation = max(
            view.gone_generation, min(alive, default=state.generation + 1) - 1
        )

    def _take_slots(self, view: NodeView, slots: tuple[SlotState, ...], state: RunState) -> None:
        now = self.now.monotonic
        gap, view.slots_at = now - view.slots_at, now
        for slot in slots:
            before = view.slots.get(slot.slot)
            view.slots[slot.slot] = slot
            if slot.stage != "running":
                view.absent_since.setdefault(slot.slot, now)
                continue
            view.absent_since.pop(slot.slot, None)
            self.highest_generation = max(self.highest_generation, slot.generation)
            self.seen_running.add((slot.generation, slot.rank))
            if before is None or (before.generation, before.stage) != (slot.generation, "running"):
                continue
            moved = (before.phase, before.step) != (slot.phase, slot.step)
            if moved or slot.phase_seconds < before.phase_seconds:
                self.moved_at = now
                seconds = before.phase_seconds
                if moved and gap <= PULSE_GAP_SECONDS:
                    seconds += max(0.0, gap - slot.phase_seconds)
                self.timeouts.saw(before.phase, is_first(before.step, state), seconds)

    def _take_fact(self, given: FactReceived, state: RunState) -> None:
        view = self.view(given.node)
        self.pending.add(given.node)
        if given.number <= view.acknowledged:
            view.retold = True
            return
        view.facts[given.number] = given.fact
        match given.fact:
            case RankFact(generation, _, rank, fact):
                self._take_rank_fact(generation, rank, fact)
            case RankExited(generation, rank):
                self.exits.setdefault(generation, {})[rank] = (given.node, given.fact)
                if not is_announced(given.fact):
                    self.deaths.setdefault(generation, {})[rank] = (given.node, given.fact)
                if given.fact.leaving is not None:
                    self.leavings.setdefault(generation, {})[rank] = given.fact.leaving
            case Stacks(generation, rank):
                self.stacks.setdefault(generation, {})[rank] = (given.node, given.fact)
            case GenerationGone(generation):
                view.gone_generation = max(view.gone_generation, generation)
            case SnapshotHeld():
                self.inventory.take_snapshot(given.node, given.fact)
            case Fetched():
                self.inventory.take_fetched(given.node, given.fact)
            case _:
                pass

    def _take_rank_fact(self, generation: int, rank: int, fact: Message) -> None:
        match fact:
            case Store():
                self.stores[generation] = fact
            case InForce(values):
                self.in_force.setdefault(generation, {})[rank] = values
            case ShardsSaved(step):
                self.shards.setdefault((generation, step), {})[rank] = fact
            case SaveFailed(step, reason):
                self.failed_saves.setdefault((generation, step), (rank, reason))
            case OrderObeyed(number, step):
                self.obeyed[number] = step
            case ExitNotice():
                self.leavings.setdefault(generation, {})[rank] = fact
            case Validation(name, step):
                self.validations[generation, name, step] = fact
            case _:
                pass

    def is_news(self, given: MetricsReceived, state: RunState) -> bool:
        """Whether the line is of the current generation and of a step not heard of yet: others are
        fenced off."""
        live = state.live
        return (
            live is not None
            and given.generation == live.generation
            and int(given.line.get("step", -1)) > self.step
        )

    def _take_metrics(self, given: MetricsReceived, state: RunState) -> None:
        if not self.is_news(given, state):
            return
        self.step = int(given.line["step"])
        self.line = self.last_line = given.line
        self.moved_at = self.now.monotonic
        first = is_first(self.step, state)
        for phase in ("step", "data"):
            seconds = given.line.get(f"{phase}_seconds")
            if isinstance(seconds, (int, float)):
                self.timeouts.saw(phase, first, float(seconds))

    def _take_cluster(self, given: ClusterObserved) -> None:
        for node, status in given.nodes.items():
            view = self.view(node)
            if status == "down" and view.cluster != "down":
                view.down_since = self.now.monotonic
            if status != view.cluster:
                # The reason it went down stays: a fence that follows would give its own.
                view.cluster, view.cluster_reason = status, given.reasons.get(node, "")
            view.seen_up = view.seen_up or status == "up"

    # Remembering ----------------------------------------------------------------------------------

    def note(self, effect: Effect) -> None:
        """Remember that `effect` was asked of the shell, so that it is not asked again at once."""
        now = self.now.monotonic
        match effect:
            case Send(node, command):
                self._sent[self.key_of(node, command)] = now
                self._note_command(node, command)
            case AcknowledgeFact(node, number):
                view = self.view(node)
                view.acknowledged, view.retold = max(view.acknowledged, number), False
                view.facts = {n: f for n, f in view.facts.items() if n > number}
                if not view.facts:
                    self.pending.discard(node)
            case FenceNode(node):
                self._sent["fence", node] = now
                self.view(node).fenced_unreached |= self.view(node).cluster != "down"
            case VerifyCheckpoint(path):
                self._sent["verify", path] = now
            case CommitManifest(path):
                self.committing[path] = now
            case CommitSnapshot():
                self.committing[effect.paths[0]] = now
                self.inventory.note_commit(effect)
            case Show():
                self.shown, self.shown_at = effect, now
            case Finish():
                self.finished = True
            case _:
                pass

    def _note_command(self, node: str, command: Message) -> None:
        self.inventory.note_command(node, command)
        match command:
            case Kill(generation):
                self.kill_asked.setdefault((node, generation), self.now.monotonic)
            case Begin(generation, _, _, _, rank):
                self.begun.add((generation, rank))
                self.view(node).gone_generation = min(
                    self.view(node).gone_generation, generation - 1
                )
            case Drop(path):  # nobody fetches it any more
                self._sent = {key: at for key, at in self._sent.items() if not _fetches(key, path)}

    def settle(self) -> None:
        """All that this input gave cause for has been decided."""
        self.committed.clear()
        self.dialled.clear()

    def key_of(self, node: str, command: Message) -> tuple[str, ...]:
        """A command's name for `was_sent`: a new connection makes everything news."""
        connection = str(self.view(node).connections)
        match command:
            case Begin(generation, _, _, _, rank):
                return (command.kind, node, connection, str(generation), str(rank))
            case Kill(generation):
                return (command.kind, node, connection, str(generation))
            case Fetch(path, _, names):
                return (command.kind, node, connection, path, *names)
            case _:
                return (command.kind, node, connection)

    def entered(self, before: RunState, state: RunState) -> None:
        """Follow a change of the state: clocks begin again, and what belonged to older generations
        is dropped."""
        now = self.now.monotonic
        if before.stage != state.stage:
            self.stage_since = now
            if state.stage in (Stage.ASSEMBLING, Stage.RECOVERING):
                # What was fetched while ranks lived says nothing: they may have written over it
                # since.
                self.inventory.fetched = {}
                self._sent = {key: at for key, at in self._sent.items() if key[0] != Fetch.kind}
        if before.orders != state.orders:
            self.order_since = now
        if before.generation != state.generation:
            self.moved_at = now
            self.step, self.line = -1, {}
            self.verified, self.failed_saves, self._sent, self.kill_asked = {}, {}, {}, {}
            for table in (
                self.stores,
                self.in_force,
                self.exits,
                self.deaths,
                self.leavings,
                self.stacks,
            ):
                _forget(table, state.generation)
            self.inventory.enter(state.generation)
            self.shards = {k: v for k, v in self.shards.items() if k[0] >= state.generation}
            self.validations = {
                k: v for k, v in self.validations.items() if k[0] >= state.generation
            }
            self.seen_running = {k for k in self.seen_running if k[0] >= state.generation}
            self.begun = {k for k in self.begun if k[0] >= state.generation}

        self._forget_settled(before, state)

    def _forget_settled(self, before: RunState, state: RunState) -> None:
        """An attempt may last for weeks: what is journalled of its saves and validations is not
        kept here as well."""
        name = state.attempt.name if state.attempt is not None else ""
        if before.settled_saves != state.settled_saves:
            settled = [
                key for key in self.shards if path_of_save(name, key[1]) in state.settled_saves
            ]
            for key in settled:
                del self.shards[key]
            self.inventory.forget_settled(name, state.settled_saves)
        if before.validations != state.validations:
            told = [key for key in self.validations if key[1:] in state.validations]
            for seen in told:
                del self.validations[seen]

    def saves_of(self, generation: int) -> Iterator[tuple[int, dict[int, ShardsSaved]]]:
        """(step, reports by rank) of every save that a rank of `generation` reported."""
        return ((step, reports) for (g, step), reports in self.shards.items() if g == generation)


DOWN_BEFORE_UP_SECONDS = 5.0
WATCH_SECONDS = 1.0


def is_first(step: int, state: RunState) -> bool:
    """Whether `step` is among the first after the current attempt's start."""
    return state.attempt is not None and step <= state.attempt.start_step + FIRST_STEPS


def is_announced(exited: RankExited) -> bool:
    """Whether the rank ended as it said it would, its work done or its state saved."""
    told = exited.leaving
    return told is not None and exited.code in (DONE, STOPPED) and told.code == exited.code


def _fetches(key: tuple[str, ...], path: str) -> bool:
    """Whether `key`, from `ClusterView.key_of`, names a command to fetch parts of the checkpoint at
    `path`."""
    return key[0] == Fetch.kind and key[3] == path


def _forget(table: dict[int, Any], generation: int) -> None:
    for old in [g for g in table if g < generation]:
        del table[old]
