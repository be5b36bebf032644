"""What the supervisor knows of its run beyond the journal: connections, heartbeats, facts not yet
settled, metrics.

Not state: it begins empty with each supervisor, and the agents report it again. Nothing here
decides anything. What belongs to a node is in its `NodeView`, what belongs to a set of ranks in its
`GenerationView`, how training moves in the `TrainingView`, which files agents have in the
`SnapshotInventory`; here is what is left, and the one door for inputs.
"""

import logging
from collections.abc import Collection

from opt_logbook.record.hardware import Offence

from opt_train.config.run_config import RunConfig
from opt_train.protocol.commands import Begin, Command, Drop, Kill, Preflight
from opt_train.protocol.facts import (
    Fetched,
    GenerationGone,
    GpusSeen,
    NodeFinding,
    OrderObeyed,
    PreflightEnded,
    RankExited,
    RankFact,
    SlotState,
    SnapshotStored,
    Stacks,
)
from opt_train.protocol.framing import Message
from opt_train.run.state import RunState, Stage
from opt_train.supervisor.effects import (
    AcknowledgeFact,
    CommitManifest,
    CommitSnapshot,
    Effect,
    FenceNode,
    Finish,
    InspectCheckpoint,
    RequestNodes,
    Send,
    ShareOffences,
    Show,
    StartAgent,
)
from opt_train.supervisor.generation_view import GenerationView
from opt_train.supervisor.inputs import (
    AgentConnected,
    AgentDisconnected,
    CheckpointInspected,
    ClusterObserved,
    FactReceived,
    HeartbeatReceived,
    Input,
    ManifestCommitted,
    MetricsRecalled,
    MetricsReceived,
    Now,
    StopAsked,
    Tick,
)
from opt_train.supervisor.node_view import NodeView
from opt_train.supervisor.sent_effects import Repeatable, SentEffects
from opt_train.supervisor.snapshot_inventory import SnapshotInventory
from opt_train.supervisor.training_view import TrainingView

STOP_ECHO_SECONDS = 2.0
"""A Ctrl-C this soon after another is the same one: a nervous finger must not cost the state."""
WATCH_SECONDS = 1.0
"""Between two looks of the rules that watch for what does not happen."""


log = logging.getLogger(__name__)


class ClusterView:
    """All of it. `apply_input` takes an input in, `mark_sent` what was asked of the shell, `follow`
    a change of the state."""

    def __init__(  # noqa: PLR0915 - its parts
        self, config: RunConfig, now: Now, nodes: Collection[str] = ()
    ) -> None:
        """`nodes`: those that this supervisor begins with."""
        self.now = now
        self.allocation = tuple(nodes)
        """Every node of the run: those that this supervisor began with, then what has come."""
        self.members = set(nodes)
        """The same: asked of every node at every input."""
        self.arrived: list[str] = []
        """Nodes that the cluster has handed out since, in the order they came."""
        self.agents_asked_for: set[str] = set()
        self.requested: RequestNodes | None = None
        """What the cluster was last asked for, and when."""
        self.requested_at = float("-inf")
        self.began = now.monotonic
        self.watching = False
        """Among the inputs at hand is a tick on which the slow watches look, once a second."""
        self._watched_at = float("-inf")
        self.nodes: dict[str, NodeView] = {}
        self.generations: dict[int, GenerationView] = {}
        """Of the newest generation, and of any other that an agent reports of."""
        self.inventory = SnapshotInventory()
        self.training = TrainingView(config, now.monotonic)
        self.pending: set[str] = set()
        """Nodes with facts that are not acknowledged, or whose acknowledgement was lost."""
        self.to_settle: set[str] = set()
        """Those of `pending` that the inputs at hand, or a change of the state, make worth a
        look."""
        self.called_down: set[str] = set()
        """Nodes that the cluster calls down."""
        self.draining: set[str] = set()
        """Nodes that an admin wants back."""
        self._observed: ClusterObserved | None = None
        self.connected_now: set[str] = set()
        """Nodes that dialled in with the input at hand."""
        self.highest_generation = 0
        self.stage_since = now.monotonic
        self.stops = 0
        """How often a person has asked for a stop."""
        self._stopped_at = float("-inf")
        self.order_since = now.monotonic
        self.obeyed: dict[int, int] = {}
        """Order -> the step at whose boundary all ranks took it."""
        self.finished = False
        self.committing: dict[str, float] = {}
        """Checkpoint -> since when its manifest is being written."""
        self.committed: dict[str, ManifestCommitted] = {}
        """What the input at hand says of manifests."""
        self.verified: dict[str, CheckpointInspected] = {}
        self.shared: tuple[Offence, ...] = ()
        """What other runs were last told of this one's nodes."""
        self.shown: Show | None = None
        self.shown_at = float("-inf")
        self._sent = SentEffects()
        self._unknown_kinds: set[str] = set()

    # Questions ------------------------------------------------------------------------------------

    def node(self, node: str) -> NodeView:
        """The view of `node`, made when first asked for."""
        if node not in self.nodes:
            self.nodes[node] = NodeView(silent_since=self.began)
        return self.nodes[node]

    def generation(self, generation: int) -> GenerationView:
        """What is known of `generation`; where that is nothing, an empty view that is not kept."""
        return self.generations.get(generation) or GenerationView()

    def age(self, since: float) -> float:
        """Seconds from `since` (monotonic) until now."""
        return self.now.monotonic - since

    def is_down(self, node: str) -> bool:
        """The cluster says the node is gone, and it does not answer."""
        return node in self.nodes and self.nodes[node].is_down(self.now.monotonic)

    def was_sent(self, effect: Repeatable, within: float) -> bool:
        """Whether `effect` was asked of the shell in the last `within` seconds."""
        return self.age(self._sent.sent_at(effect, self._connections_of(effect))) < within

    # Inputs ---------------------------------------------------------------------------------------

    def apply_input(self, input_: Input, now: Now, state: RunState) -> bool:
        """Take `input_` in; returns whether there may be something to decide. What comes twice
        counts once.

        Most of what comes says nothing new: the agents of a large run beat some hundred times a
        second. What only time decides is decided on a tick.
        """
        self.now = now
        match input_:
            case Tick():
                if now.monotonic - self._watched_at >= WATCH_SECONDS:
                    self.watching, self._watched_at = True, now.monotonic
            case HeartbeatReceived(node, heartbeat):
                # Heartbeats are never numbered: the next one replaces this one. An agent sends all
                # that waits for it before its first heartbeat on a connection, so one heartbeat
                # proves that its facts are here.
                view = self.node(node)
                before, view.caught_up = view.caught_up, True
                return self._apply_slots(view, heartbeat.slots, state) or not before
            case FactReceived():
                self._apply_fact(input_)
            case MetricsReceived() | MetricsRecalled():
                self.training.apply_metrics(input_, state, now.monotonic)
            case ClusterObserved():
                return self._apply_observation(input_)
            case AgentConnected(node, agent):
                self.connected_now.add(node)
                self.inventory.apply_connection(node, agent)
                self.node(node).connect(agent, state.generation, now.monotonic)
                self._apply_slots(self.node(node), agent.slots, state)
            case AgentDisconnected(node):
                # Silence is unknown (invariant 11): a clock begins to run, and a rule acts when
                # something else agrees.
                self.node(node).disconnect(now.monotonic)
            case CheckpointInspected(path):
                self.verified[path] = input_
            case ManifestCommitted(path):
                self.committing.pop(path, None)
                self.committed[path] = input_
                self.inventory.apply_committed(input_)
            case StopAsked(by):
                self._apply_stop(by)
            case _:
                pass
        return True

    def _apply_observation(self, input_: ClusterObserved) -> bool:
        if input_ == self._observed:
            return False
        self._observed = input_
        for node, status in input_.nodes.items():
            view = self.node(node)
            view.observe(status, input_.reasons.get(node, ""), self.now.monotonic)
            view.draining = input_.draining.get(node, "")
            view.taken_back = node in input_.taken_back
            if node not in self.members:
                self.members.add(node)
                self.allocation += (node,)
                self.arrived.append(node)
        self.called_down = {node for node, status in input_.nodes.items() if status == "down"}
        self.draining = {node for node, why in input_.draining.items() if why}
        return True

    def _apply_stop(self, by: str) -> None:
        # A scheduler's signal does not hurry, and it is repeated: `scancel` reaches the supervisor
        # and the launch script, which hands its own on, and the time limit sends a second one while
        # a long save goes on.
        if by in ("SIGTERM", "SIGUSR1") or self.age(self._stopped_at) <= STOP_ECHO_SECONDS:
            return
        self.stops += 1
        self._stopped_at = self.now.monotonic

    def _apply_slots(self, view: NodeView, slots: tuple[SlotState, ...], state: RunState) -> bool:
        """Whether other ranks than before run there, or wait."""
        now = self.now.monotonic
        gap, view.slots_at = now - view.slots_at, now
        changed = False
        for slot in slots:
            before = view.slots.get(slot.slot)
            view.slots[slot.slot] = slot
            changed = changed or before is None or _who(before) != _who(slot)
            if slot.stage != "running":
                view.absent_since.setdefault(slot.slot, now)
                continue
            view.absent_since.pop(slot.slot, None)
            # An agent may show a generation that the journal has lost with a damaged line. The next
            # number must lie above that one too, or fencing would let its ranks write.
            self.highest_generation = max(self.highest_generation, slot.generation)
            self._known(slot.generation).rank(slot.rank).was_running = True
            if before is None or (before.stage, before.generation) != ("running", slot.generation):
                continue
            self.training.apply_slot(before, slot, gap, state, now)
        if changed:
            running = (slot.generation for slot in view.slots.values() if slot.stage == "running")
            view.running = frozenset(running)
        return changed

    def _apply_fact(self, input_: FactReceived) -> None:  # noqa: PLR0912 - one case a fact
        node, fact = input_.node, input_.fact
        view = self.node(node)
        self.pending.add(node)
        self.to_settle.add(node)
        # Its acknowledgement was lost with a link. It is acknowledged again and not applied again:
        # by now the attempt that it speaks of may be over.
        if input_.number <= view.acknowledged:
            view.resent = True
            return
        view.facts[input_.number] = fact
        match fact:
            case RankFact(fact=OrderObeyed(number, step)):
                self.obeyed[number] = step
            case RankFact(generation, _, rank, own):
                if not self._known(generation).apply_rank_fact(rank, own):
                    self._note_unknown(node, own)
                self.training.apply_validation(own)
            case RankExited(generation):
                self._known(generation).apply_exit(node, fact)
            case Stacks(generation):
                self._known(generation).apply_stacks(node, fact)
            case GenerationGone(generation):
                view.gone_generation = max(view.gone_generation, generation)
            case SnapshotStored(generation):
                self._known(generation).apply_snapshot(fact)
                self.inventory.apply_snapshot(node, fact)
            case Fetched():
                self.inventory.apply_fetched(node, fact)
            case PreflightEnded():
                view.preflight_ended, view.preflight_result = self.now.monotonic, fact
            case GpusSeen(gpus):
                view.gpus = gpus
            case NodeFinding():
                pass  # it waits among the node's facts until it is journalled (rules/findings.py)
            case _:
                self._note_unknown(node, fact)

    def _note_unknown(self, node: str, fact: Message) -> None:
        """A fact that nothing is made of is kept and never acknowledged: it is for a supervisor
        that knows it."""
        if fact.kind not in self._unknown_kinds:
            self._unknown_kinds.add(fact.kind)
            log.warning(
                "%s sent the fact %r, which means nothing here: it is kept", node, fact.kind
            )

    # What was decided -----------------------------------------------------------------------------

    def mark_sent(self, effect: Effect) -> None:  # noqa: PLR0912 - one case an effect
        """Remember that `effect` was asked of the shell, so that it is not asked again at once."""
        now = self.now.monotonic
        match effect:
            case Send(node, command):
                self._sent.mark(effect, self._connections_of(effect), now)
                self._mark_command(node, command)
            case AcknowledgeFact(node, number):
                self.node(node).acknowledge(number)
                if not self.node(node).facts:
                    self.pending.discard(node)
            case FenceNode(node):
                self._sent.mark(effect, 0, now)
                # The cluster will call it down from now on, by our own hand: the diagnosis must not
                # take that for a failure of the node.
                self.node(node).fenced_unreached |= self.node(node).cluster != "down"
            case StartAgent(node):
                self.agents_asked_for.add(node)
                self.node(node).agent_asked = self.now
            case RequestNodes():
                self.requested, self.requested_at = effect, now
            case InspectCheckpoint():
                self._sent.mark(effect, 0, now)
            case CommitManifest(path):
                self.committing[path] = now
            case CommitSnapshot():
                self.committing[effect.paths[0]] = now
                self.inventory.mark_commit(effect)
            case ShareOffences(_, _, offences):
                self.shared = offences
            case Show():
                self.shown, self.shown_at = effect, now
            case Finish():
                self.finished = True
            case _:
                pass

    def _mark_command(self, node: str, command: Command) -> None:
        self.inventory.mark_command(node, command)
        match command:
            case Kill(generation):
                self._known(generation).kill_sent_at.setdefault(node, self.now.monotonic)
            case Begin(generation, _, _, _, rank):
                self._known(generation).begun.add(rank)
                view = self.node(node)
                # What did not run when the agent dialled in was marked as gone
                # (`NodeView.connect`); from here on it may run.
                view.gone_generation = min(view.gone_generation, generation - 1)
            case Preflight():
                self.node(node).preflight_asked = self.now.monotonic
            case Drop(path):  # nobody fetches it any more
                self._sent.forget_fetches(path)

    def end_input(self) -> None:
        """All that the inputs at hand gave cause for has been decided."""
        self.watching = False
        self.to_settle.clear()
        self.committed.clear()
        self.connected_now.clear()

    def follow(self, before: RunState, state: RunState) -> None:
        """Follow a change of the state: clocks begin again, and what belonged to older generations
        is dropped."""
        now = self.now.monotonic
        self.to_settle |= self.pending
        if before.stage != state.stage:
            self.stage_since = now
            if state.stage in (Stage.ASSEMBLING, Stage.RECOVERING):
                # What was fetched while ranks lived says nothing: they may have written over it
                # since.
                self.inventory.fetched = {}
                self._sent.forget_fetches()
        if before.orders_given != state.orders_given:
            self.order_since = now
        if before.generation != state.generation:
            self.training.begin_attempt(state, now)
            self.verified = {}
            self._sent.forget()
            self.inventory.passed_on = {}
            for old in [g for g in self.generations if g < state.generation]:
                del self.generations[old]
        self._forget_settled(before, state)

    def _forget_settled(self, before: RunState, state: RunState) -> None:
        """An attempt may last for weeks: what is journalled of its saves and validations is not
        kept here as well."""
        generation = self.generation(state.generation)
        if before.settled_saves != state.settled_saves and state.attempt is not None:
            self.inventory.forget_settled(state.settled_saves)
            generation.forget_settled(state.attempt.name, state.settled_saves)
        if before.validations != state.validations:
            generation.forget_validations(state.validations)

    def _known(self, generation: int) -> GenerationView:
        """The view of `generation`, kept from now on."""
        if generation not in self.generations:
            self.generations[generation] = GenerationView()
        return self.generations[generation]

    def _connections_of(self, effect: Repeatable) -> int:
        return self.node(effect.node).connections if isinstance(effect, Send) else 0


def _who(slot: SlotState) -> tuple[object, ...]:
    """What of a slot decisions go by; where its rank is in a step, the watches alone look at."""
    return (slot.stage, slot.spare, slot.pid, slot.generation, slot.rank)
