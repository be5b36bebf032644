"""Facts: what ranks and agents say about themselves. They travel up; nobody waits for an answer.

A rank tells its agent over a pipe; the agent adds who said it and relays it to the supervisor. An
agent keeps each numbered fact until the supervisor acknowledges it, and tells its whole state on
every new connection.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_train.protocol.framing import Message

PHASES = ("start", "data", "step", "waiting", "checkpoint", "evaluation")
"""What a rank can be busy with: start (rendezvous, build, restore), data, step, waiting (for the
word or an order), checkpoint, evaluation."""


# What a rank says ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Warm(Message, kind="warm"):
    """The process has imported everything a rank needs and waits for `Begin`."""

    pid: int
    import_seconds: float


@dataclass(frozen=True, slots=True)
class Store(Message, kind="store"):
    """Rank 0 has bound the rendezvous store of its generation."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Phase(Message, kind="phase"):
    """The rank has entered `phase` (one of `PHASES`) of training step `step`. The agent's clock
    does the timing."""

    # A rank that is stopped or hangs cannot report that time passes: its agent has to time it.
    phase: str
    step: int


@dataclass(frozen=True, slots=True)
class Progress(Message, kind="progress"):
    """A long phase moves: `done` of `total` units. It restarts the phase's clock."""

    # Without it a long save or validation looks like a hang, as first and evaluation steps did to
    # DLRover.
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class InForce(Message, kind="in_force"):
    """What is really in effect after a start, read back from the optimizer, scaler and cursor."""

    # Invariant 3. metaseq took betas and eps back from the checkpoint on resume, which spoiled
    # OPT's runs 12.35 to 12.37: so they are read where they act, not in the configuration.
    values: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    """The variables that decide how ranks talk to each other (`run/fabric_settings.py`)."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each part of the start took, in order."""


@dataclass(frozen=True, slots=True)
class Metrics(Message, kind="metrics"):
    """One step's metrics line (docs/journal.md). The only fact that may be dropped; drops are
    counted."""

    # Invariant 10: when the pipe is full, a line is lost and no step waits.
    line: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Validation(Message, kind="validation"):
    """Loss in nats per token over the whole named validation set, at `step`."""

    name: str
    step: int
    loss: float
    tokens: int


@dataclass(frozen=True, slots=True)
class SavedFile:
    """One fsynced file of a checkpoint; `path` is relative to the checkpoint's folder."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardsSaved(Message, kind="shards_saved"):
    """This rank's files of the checkpoint at `step` lie fsynced in `folder`. Rank 0 reports
    `state.json` too."""

    step: int
    folder: str
    files: tuple[SavedFile, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class SaveFailed(Message, kind="save_failed"):
    """The save at `step` failed on this rank, for example on a full disk; training goes on."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A file of a snapshot in the memory of the rank that took it: `fd` is the number of its
    descriptor there."""

    path: str
    bytes: int
    sha256: str
    fd: int


@dataclass(frozen=True, slots=True)
class SnapshotTaken(Message, kind="snapshot_taken"):
    """This rank's part of the state at `step` lies in memory of its own; the agent is to hold it
    from now on.

    Said by each rank for itself. Rank 0's files include `state.json`.
    """

    step: int
    files: tuple[MemoryFile, ...]
    seconds: float
    is_last: bool = False
    """The ranks stop at this step: it is worth more than the ones before."""


@dataclass(frozen=True, slots=True)
class OrderObeyed(Message, kind="order_obeyed"):
    """Order `number` took effect at the boundary before `step`, on every rank alike."""

    number: int
    step: int


@dataclass(frozen=True, slots=True)
class RolledBack(Message, kind="rolled_back"):
    """This rank has gone back to `step` and is one of another generation and attempt: what it says
    from here on is said by that one."""

    step: int
    attempt: str
    generation: int


ODD_RANKS_MAX = 64
"""More than that have no node in common."""


@dataclass(frozen=True, slots=True)
class Probed(Message, kind="probed"):
    """What the data looks like to the state at `step`, which rollback `order` has gone back to: the
    mean loss in nats per token at each of `places`, in the order of the data, in samples."""

    order: int
    step: int
    places: tuple[int, ...]
    losses: tuple[float, ...]
    """As training measures them: with dropout, where the model has it."""
    odd_ranks: tuple[int, ...] = ()
    """That compute another loss than most from the same weights and the same sequences, the first
    `ODD_RANKS_MAX`; all of them where none is that of most."""


@dataclass(frozen=True, slots=True)
class ExitNotice(Message, kind="leaving"):
    """The rank's last fact: the exit code that will follow and why. An exit code is believed only
    with this."""

    # A crash can leave any exit code behind; a notice sent before shows that the rank chose it.
    code: int
    step: int
    reason: str
    dropped_metrics: int = 0
    cause: str = ""
    """A cause label where the rank itself knows it (`config`, `data`, `corrupt_checkpoint`,
    `stopped`), else empty."""


# What an agent says -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SlotState:
    """One rank slot of a node as its agent sees it now."""

    slot: int
    stage: str
    """``empty``, ``warming``, ``warm`` (a spare waits for `Begin`) or ``running``."""
    spare: bool = False
    """A warm spare waits beside the running rank (or is the warm process itself)."""
    pid: int = 0
    generation: int = 0
    attempt: str = ""
    rank: int = -1
    phase: str = ""
    step: int = -1
    phase_seconds: float = 0.0
    """Seconds in this phase since its start or its last `Progress`."""
    process_state: str = ""
    """The kernel's letter from /proc: R, S, D, T (stopped), Z."""


@dataclass(frozen=True, slots=True)
class SnapshotFiles:
    """Files of one checkpoint that an agent holds, in memory or on its node's disk."""

    path: str
    """The checkpoint: `memory/<attempt>/step-<step>` or `node/<attempt>/step-<step>`, as it stands
    in the journal."""
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeGpu:
    """Which GPU it is, whatever node it is built into; what its driver does not say is empty."""

    index: int
    """Among those of its node."""
    uuid: str = ""
    serial: str = ""
    """Of the board, as its label has it."""
    pci: str = ""
    """Its address on the bus: ``00000000:3B:00.0``."""


@dataclass(frozen=True, slots=True)
class AgentState(Message, kind="agent_state"):
    """The agent's whole state, told first on every connection."""

    # Whole, not a difference: a supervisor that restarted or took over has no state to add one to.
    node: str
    pid: int
    slots: tuple[SlotState, ...]
    leader_generation: int = 0
    """The highest supervisor generation this agent has obeyed."""
    held: tuple[SnapshotFiles, ...] = ()
    address: str = ""
    """``host:port`` at which other agents of the run get what it holds; empty: nothing can be
    had."""
    first_leader: int = 0
    """The supervisor that this agent obeyed first: whether it has lived through a change."""
    gpus: tuple[NodeGpu, ...] = ()
    """Those of the node; empty: there are none, or they have not been read yet."""


@dataclass(frozen=True, slots=True)
class Heartbeat(Message, kind="pulse"):
    """Sent every second, never numbered: the agent is there, and this is where its ranks are."""

    # No number, so never sent again: an old one is worth nothing once the next has come.
    slots: tuple[SlotState, ...]


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a rank's log: evidence. `file` is relative to the run directory, `line` counts from
    1."""

    file: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class GpusSeen(Message, kind="gpus_seen"):
    """The GPUs of the agent's node, when they are first read and whenever they are others."""

    gpus: tuple[NodeGpu, ...]


@dataclass(frozen=True, slots=True)
class NodeFinding(Message, kind="node_finding"):
    """What a probe found of the agent's node: the one thing that every probe publishes.

    The same finding published again is harmless. What is done about it, if anything, is the
    supervisor's to decide: a row of `supervisor.rules.responses.RESPONSES`.
    """

    cause: str
    """A label of docs/causes.md."""
    detail: str
    """One that the table of responses has a row for, or words for a person."""
    permanent: bool
    """A condition: the node stays so until it is repaired. False: an event, which has passed."""
    confidence: float
    """How sure the probe is, 0 to 1."""
    evidence: tuple[LogLine, ...] = ()
    gpu: NodeGpu | None = None
    """The one it is about; None: it is of no single GPU, or not known which."""


@dataclass(frozen=True, slots=True)
class PreflightEnded(Message, kind="preflight_ended"):
    """The answer to `Preflight`: `failed` of `tests` did, each of which is a `NodeFinding` that was
    sent before, or `why` says why they came to no end."""

    tests: int
    failed: int
    seconds: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class RankFact(Message, kind="rank_fact"):
    """A rank's own fact, relayed."""

    generation: int
    attempt: str
    rank: int
    fact: Message


@dataclass(frozen=True, slots=True)
class RankExited(Message, kind="rank_exited"):
    """A rank's process is gone and reaped. Exactly one of `code` and `signal` is set."""

    generation: int
    rank: int
    slot: int
    pid: int
    code: int | None
    signal: int | None
    killed_by_agent: bool
    """The agent sent the signal itself, on command."""
    leaving: ExitNotice | None
    phase: str
    step: int
    log_tail: tuple[LogLine, ...] = ()


@dataclass(frozen=True, slots=True)
class Stacks(Message, kind="stacks"):
    """What each rank of a generation was doing when it was asked, before it was killed."""

    generation: int
    rank: int
    answered: bool
    process_state: str
    tail: tuple[LogLine, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationGone(Message, kind="generation_gone"):
    """No rank of any generation up to this one lives on the node any more."""

    generation: int


@dataclass(frozen=True, slots=True)
class SnapshotStored(Message, kind="snapshot_held"):
    """The agent holds what `SnapshotTaken` told of, whatever becomes of the rank."""

    generation: int
    attempt: str
    rank: int
    step: int
    files: tuple[SavedFile, ...]
    seconds: float
    state: Mapping[str, Any] | None = None
    """Of rank 0: its `state.json`."""
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Fetched(Message, kind="fetched"):
    """The answer to `Fetch`: every file that was asked for is here and has been verified, or `why`
    says what is not."""

    path: str
    names: tuple[str, ...]
    """As asked for."""
    why: str = ""
    folder: str = ""
    """Where the node's ranks find them, beside the manifest."""


@dataclass(frozen=True, slots=True)
class NumberedFact(Message, kind="told"):
    """A numbered fact: kept and told again until acknowledged."""

    # TCP acknowledges to the kernel, not to the journal: what a supervisor had read and not written
    # down when it died must come again.
    number: int
    fact: Message


FACTS_OF_A_RANK: tuple[type[Message], ...] = (
    Warm,
    Store,
    Phase,
    Progress,
    InForce,
    Metrics,
    Validation,
    ShardsSaved,
    SaveFailed,
    SnapshotTaken,
    OrderObeyed,
    RolledBack,
    Probed,
    ExitNotice,
)


def is_metrics_line(line: Any) -> bool:
    """Whether `line` is what the supervisor can file: an object with an integer `step`."""
    # Not isinstance for the step: to Python, true is an int.
    return isinstance(line, dict) and type(line.get("step")) is int
