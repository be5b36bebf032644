"""One node as it looks from the supervisor: its connection, its slots, what the cluster says of
it."""

from dataclasses import dataclass, field

from opt_train.protocol.facts import AgentState, NodeGpu, PreflightEnded, SlotState
from opt_train.protocol.framing import Message
from opt_train.supervisor.inputs import Now

DOWN_BEFORE_UP_SECONDS = 5.0
"""A node that was never up counts as down after this: right after a start the cluster may not have
seen the agent that it was just asked for."""

NEVER = float("-inf")


@dataclass(slots=True)
class NodeView:
    """All times are monotonic seconds."""

    silent_since: float
    """When its connection ended, or when this supervisor began."""
    connected: bool = False
    connected_at: float = 0.0
    connections: int = 0
    caught_up: bool = False
    """A heartbeat has come on this connection: facts that the agent keeps are sent before it, so
    none is outstanding."""
    pid: int = 0
    first_leader: int = 0
    """The supervisor that its agent obeyed first."""
    slots: dict[int, SlotState] = field(default_factory=dict)
    slots_at: float = 0.0
    running: frozenset[int] = frozenset()
    """Generations of the ranks that run in its slots."""
    absent_since: dict[int, float] = field(default_factory=dict)
    """Slot -> since when no rank runs in it."""
    lost_generation: int = -1
    """Its agent was replaced by another one: ranks up to this generation died with it unless they
    are seen."""
    gone_generation: int = -1
    """No rank of a generation up to this one lives here."""
    cluster: str = "unknown"
    cluster_reason: str = ""
    draining: str = ""
    """An admin wants the node back: why."""
    taken_back: bool = False
    """The scheduler has taken it away from the run."""
    down_since: float = 0.0
    fenced_unreached: bool = False
    """Fenced because it did not answer, while the cluster did not call it down: down by our own
    hand, then."""
    seen_up: bool = False
    preflight_asked: float = NEVER
    preflight_ended: float = NEVER
    """When this agent was last asked to test its node, and when it last answered."""
    preflight_result: PreflightEnded | None = None
    """What it answered."""
    agent_asked: Now | None = None
    """When an agent was last asked for here, beside those with which this supervisor began."""
    gpus: tuple[NodeGpu, ...] = ()
    """Those of the node; empty: not read yet, or none."""
    facts: dict[int, Message] = field(default_factory=dict)
    """Received and not yet acknowledged, by number, in order."""
    acknowledged: int = 0
    resent: bool = False
    """An acknowledged fact came again: the acknowledgement was lost."""

    def connect(self, state: AgentState, generation: int, now: float) -> None:
        """Its agent dialled in. `generation` is the run's newest."""
        if self.pid != state.pid:
            if self.pid:
                # Ranks die with their agent (PR_SET_PDEATHSIG): another process here means that
                # they are gone, whoever saw it.
                self.lost_generation = generation
            # Another process numbers its facts anew.
            self.pid, self.facts, self.acknowledged = state.pid, {}, 0
            self.first_leader = state.first_leader
            self.preflight_asked = self.preflight_ended = NEVER
            self.preflight_result = None
        elif self.preflight_asked > self.preflight_ended:
            self.preflight_asked = NEVER  # the command may have been lost with the link
        self.connected, self.seen_up, self.fenced_unreached = True, True, False
        self.connected_at = now
        self.gpus = state.gpus or self.gpus
        self.connections += 1
        self.caught_up = self.resent = False
        # Nothing was sent on this connection yet, so what does not run now will not, unless it is
        # begun again.
        alive = [slot.generation for slot in state.slots if slot.stage == "running"]
        oldest = min(alive, default=generation + 1)
        self.gone_generation = max(self.gone_generation, oldest - 1)

    def disconnect(self, now: float) -> None:
        """The connection ended. That means nothing by itself."""
        if self.connected:
            self.connected, self.silent_since = False, now

    def acknowledge(self, number: int) -> None:
        """Facts up to `number` are acknowledged."""
        self.acknowledged, self.resent = max(self.acknowledged, number), False
        self.facts = {n: fact for n, fact in self.facts.items() if n > number}

    def observe(self, status: str, reason: str, now: float) -> None:
        """What the cluster says of it."""
        if status == "down" and self.cluster != "down":
            self.down_since = now
        if status != self.cluster:
            # The reason it went down stays: a fence that follows would give its own.
            self.cluster, self.cluster_reason = status, reason
        self.seen_up = self.seen_up or status == "up"

    def is_down(self, now: float) -> bool:
        """The cluster says the node is gone, and it does not answer."""
        # An agent that answers outweighs the cluster: Slurm marks a cut node DOWN after 13 to 20 s
        # (measured), and its tasks run on until the cable is back.
        if self.connected or self.cluster != "down":
            return False
        return self.seen_up or now - self.down_since >= DOWN_BEFORE_UP_SECONDS
