"""Everything the supervisor's core can learn. Its host makes these; nothing else enters.

===================== =============================================== ============================
input                 where it comes from                             more than once
===================== =============================================== ============================
`AgentConnected`      a link that has proved itself                   the newer one counts
`AgentDisconnected`   a link that broke, or was silent for long       no; means nothing by itself
`FactReceived`        an agent, numbered, until it is acknowledged    yes: the number says so
`HeartbeatReceived`   an agent, every second                          the newest counts
`MetricsReceived`     rank 0 through its agent; some may be lost      yes: (attempt, step) says so
`MetricsRecalled`     `metrics/`, once, before all others             no
`ClusterObserved`     the cluster, every second                       the newest counts
`CheckpointInspected` the answer to `InspectCheckpoint`               no
`ManifestCommitted`   the answer to a commit                          no
`BatchRead`           a process that an alarm's line has begun        no
`JournalWasStalled`   an append that took long                        no
`InboxReceived`       a file in `inbox/`, kept until it is journalled after a supervisor's death
`StopAsked`           a signal                                        counted: twice is impatience
`Tick`                the host's clock, five times a second           yes
===================== =============================================== ============================
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_logbook.record.events import RunCreated
from opt_logbook.record.hardware import Offence
from opt_logbook.record.stability_events import BatchSource

from opt_train.clusters.topology import Topology
from opt_train.protocol.facts import AgentState, Heartbeat
from opt_train.protocol.framing import Message


@dataclass(frozen=True, slots=True)
class Now:
    """`wall`: Unix seconds, for the journal. `monotonic`: seconds, for every timeout and
    interval."""

    wall: float
    monotonic: float


@dataclass(frozen=True, slots=True)
class Identity:
    """What a supervisor knows of itself and of its run when it starts; constant for its life."""

    leader: int
    """Its fencing number: one more than the newest in the journal."""
    host: str
    pid: int
    version: str
    run_directory: str
    config_path: str
    config_sha256: str
    nodes: tuple[str, ...]
    """Every node of the allocation, those meant to train first."""
    created: RunCreated
    """Journalled if the journal is empty."""
    opens_lineage: bool = False
    """Training keys or code changed and the user said `lineage=new` (a first run always opens
    lineage 1)."""
    lineage_difference: tuple[str, ...] = ()
    operational_difference: tuple[str, ...] = ()
    git_commit: str = ""
    git_dirty: bool = False
    packages: Mapping[str, str] = field(default_factory=dict)
    code_sha256: str = ""
    """Of the code with which ranks train, where it is a lineage's copy."""
    supervisor_difference: tuple[str, ...] = ()
    """What this supervisor runs and is not that code."""
    topology: Topology = field(default_factory=Topology)
    """The network between the nodes, those that may be added too."""
    offences: tuple[Offence, ...] = ()
    """What nodes were taken out of other runs for."""


@dataclass(frozen=True, slots=True)
class AgentConnected:
    """An authenticated agent dialled in and sent its state. A newer connection of a node replaces
    the older."""

    node: str
    state: AgentState


@dataclass(frozen=True, slots=True)
class AgentDisconnected:
    """The node's current connection ended. By itself this means nothing: silence is unknown."""

    node: str


@dataclass(frozen=True, slots=True)
class FactReceived:
    """A numbered fact of an agent (`RankFact`, `RankExited`, `Stacks`, `GenerationGone`). May come
    twice."""

    node: str
    number: int
    fact: Message


@dataclass(frozen=True, slots=True)
class HeartbeatReceived:
    node: str
    heartbeat: Heartbeat


@dataclass(frozen=True, slots=True)
class MetricsReceived:
    """One step's metrics line from rank 0, decoded. May come twice."""

    node: str
    generation: int
    line: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MetricsRecalled:
    """Metrics lines that the supervisor before has filed, of the live chain, oldest first: the
    first input, so that a new supervisor knows where training was. `of_attempt` are those of the
    attempt that may still live, `before` those of the attempts that it descends from."""

    before: tuple[Mapping[str, Any], ...]
    of_attempt: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class ClusterObserved:
    """What the cluster says of its nodes: `up`, `down` (with the reason) or `unknown`. Every
    second."""

    nodes: Mapping[str, str]
    reasons: Mapping[str, str]
    draining: Mapping[str, str] = field(default_factory=dict)
    """Nodes that an admin wants back, with the reason given."""
    taken_back: frozenset[str] = frozenset()
    """Nodes that are down since the scheduler has taken them away from the run."""


@dataclass(frozen=True, slots=True)
class CheckpointInspected:
    """The answer to `InspectCheckpoint`. `why` is empty when it is good."""

    path: str
    why: str
    manifest_sha256: str = ""


@dataclass(frozen=True, slots=True)
class ManifestCommitted:
    """The answer to `CommitManifest` or `CommitSnapshot`. `why` is empty when the manifest is in
    place."""

    path: str
    attempt: str
    step: int
    why: str
    manifest_sha256: str = ""
    bytes: int = 0
    files: int = 0
    seconds: float = 0.0
    healthy: bool = True
    world_size: int = 0
    config_sha256: str = ""


@dataclass(frozen=True, slots=True)
class BatchRead:
    """What the batch consisted of that took `attempt` to `step`, where the journal has an alarm."""

    attempt: str
    step: int
    alarm: str
    documents: int
    sources: tuple[BatchSource, ...]


@dataclass(frozen=True, slots=True)
class JournalWasStalled:
    """An append took `seconds` on a sick file system; it is durable now."""

    seconds: float


@dataclass(frozen=True, slots=True)
class InboxReceived:
    """Somebody dropped a message into `inbox/`: `{"kind": "note", "author", "text"}`, `{"kind":
    "stop", "by"}`, `{"kind": "hold", "by", "reason", "asked"}`, `{"kind": "resume", "by"}` or
    `{"kind": "intervene", "by", "why", "changes"}`."""

    message: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StopAsked:
    """SIGINT or SIGTERM reached the supervisor, or the scheduler's limit is near."""

    by: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes: several times a second."""


Input = (
    AgentConnected
    | AgentDisconnected
    | FactReceived
    | HeartbeatReceived
    | MetricsReceived
    | MetricsRecalled
    | ClusterObserved
    | CheckpointInspected
    | ManifestCommitted
    | BatchRead
    | JournalWasStalled
    | InboxReceived
    | StopAsked
    | Tick
)
