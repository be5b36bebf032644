"""What can happen to a run: one frozen dataclass a kind of journal line (docs/journal.md).

The supervisor writes them, `fold` makes the run's state of them, and the chronicle tells them. A
field, once published, keeps its meaning; new fields get a default, so that older journals still
read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_logbook.record.event import Event as Event  # noqa: PLC0414 - with its kinds
from opt_logbook.record.hardware import GpuIdentity

HELD_OUT = "validation"
"""The validation set that every run has: the part of its corpus that is held out. Others have names
of their own."""


@dataclass(frozen=True, slots=True)
class Unknown(Event):
    """A kind that a newer version wrote: kept as it is, folded to nothing."""

    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Evidence:
    """A line that supports a diagnosis: of a log, or what the supervisor itself observed (file
    empty, line 0)."""

    file: str
    line: int
    text: str


# The run ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunCreated(Event, kind="run_created"):
    """The first line of a journal."""

    name: str
    seed: int
    model: str
    parameters: int
    steps: int
    """Steps the run is meant to take, until a lineage changes them (`LineageOpened.steps`)."""
    tokens_per_step: int
    tokenizer: str = ""
    data: str = ""
    data_fingerprint: str = ""
    train_tokens: int = 0
    validation_tokens: int = 0
    unigram_perplexity: float = 0.0
    """Validation perplexity of a unigram model of the training tokens: the bar a trained model must
    clear."""
    learning_rate: float = 0.0
    ledger_of: str = ""
    """The run directory whose ledger it trains under from the start."""
    ledger: tuple[Mapping[str, Any], ...] = ()
    """The lasting orders of that one, each with the `step` that it holds from."""
    ledger_difference: tuple[str, ...] = ()
    """What is not as there and changes the weights: `key: there -> here`."""


@dataclass(frozen=True, slots=True)
class LineageOpened(Event, kind="lineage_opened"):
    """Training keys and code that all attempts from here on share; these are `<lineage>.<n>`."""

    lineage: int
    config_sha256: str
    difference: tuple[str, ...] = ()
    """What is not as in the lineage before: `key: old -> new`, `package: old -> new`, `code: file
    changed`; empty for the first lineage."""
    code_sha256: str = ""
    """Of the sources copied into `code/<lineage>/`, from which agents and ranks run."""

    @property
    def steps(self) -> int | None:
        """Steps the run is meant to take from here on; None: as many as before."""
        for change in self.difference:
            key, _, values = change.partition(": ")
            new = values.rpartition(" -> ")[2]
            if key == "train.steps" and new.isascii() and new.isdecimal():
                return int(new)
        return None


@dataclass(frozen=True, slots=True)
class SupervisorStarted(Event, kind="supervisor_started"):
    """A supervisor took the lock. `leader` is its fencing number; `resumed` says the journal had
    lines already."""

    leader: int
    host: str
    pid: int
    version: str
    resumed: bool
    code_difference: tuple[str, ...] = ()
    """How the supervisor's own code differs from the lineage's, with which ranks train: `code: file
    changed`."""


@dataclass(frozen=True, slots=True)
class AgentsAdopted(Event, kind="agents_adopted"):
    """A new supervisor found ranks of the current generation training and let them."""

    generation: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunFinished(Event, kind="run_finished"):
    """All steps are done."""

    loss: float
    validation_perplexity: float
    tokens: int
    seconds: float
    """Wall clock since `run_created`, pauses included."""


@dataclass(frozen=True, slots=True)
class RunStopped(Event, kind="run_stopped"):
    """A person or the scheduler asked; the state is saved at `saved_step` (-1: nothing was saved
    yet)."""

    by: str
    saved_step: int


@dataclass(frozen=True, slots=True)
class RunHalted(Event, kind="run_halted"):
    """The supervisor stops here: a person must decide `question`."""

    question: str
    cause: str


@dataclass(frozen=True, slots=True)
class HoldBegan(Event, kind="hold_began"):
    """A person holds the run: it saves and stops, and no attempt begins until `hold_ended`."""

    by: str
    reason: str = ""
    asked: float = 0.0
    """Unix seconds at which it was asked for, which may be long before somebody led the run and
    could journal it; 0: not known."""


@dataclass(frozen=True, slots=True)
class HoldEnded(Event, kind="hold_ended"):
    """A person has taken the hold back: whoever starts the run goes on."""

    by: str


# Nodes --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeJoined(Event, kind="node_joined"):
    """An agent dialled in for the first time. `role` is ``active`` or ``buffer``."""

    node: str
    role: str
    slots: int


@dataclass(frozen=True, slots=True)
class NodeFailed(Event, kind="node_failed"):
    """The node is out, for the rest of the run unless `node_returned` says otherwise."""

    node: str
    incident: int
    cause: str


@dataclass(frozen=True, slots=True)
class NodePromoted(Event, kind="node_promoted"):
    """A buffer node takes the place of `replaces`."""

    node: str
    replaces: str
    incident: int


@dataclass(frozen=True, slots=True)
class PlaceVacated(Event, kind="place_vacated"):
    """No buffer node is left for the place of `node`: the run goes on with fewer nodes, at the same
    global batch. The place is filled again by `node_promoted`, which `replaces` the same node."""

    node: str
    nodes: int
    """How many are left to train."""
    incident: int


@dataclass(frozen=True, slots=True)
class FindingNoted(Event, kind="finding_noted"):
    """A probe of the node's agent found something (labels: docs/causes.md). Nothing need have
    failed."""

    node: str
    cause: str
    blame: str
    detail: str
    permanent: bool
    """The node stays so until it is repaired; False: it has passed."""
    confidence: float
    evidence: tuple[Evidence, ...]
    action: str
    """``note``, ``restart``, ``replace_now``, ``replace_at_checkpoint``, ``drain`` or ``halt``."""
    mode: str
    """``act``: the action is carried out. ``observe`` or ``advise``: this line is all."""
    response: str
    """What the supervisor does about it, or would have done, one sentence."""
    gpu: GpuIdentity | None = None
    """The one it is about; null: it is of no single GPU, or not known which."""


# Attempts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttemptStarted(Event, kind="attempt_started"):
    """A stretch in which `step` only grows begins. The line's `step` is where it begins: the
    checkpoint's, or 0."""

    generation: int
    parent: str
    """The attempt whose checkpoint is restored; empty at the very start."""
    checkpoint: str
    """Path relative to the run directory; empty: from the initial weights."""
    manifest_sha256: str
    nodes: tuple[str, ...]
    buffer: tuple[str, ...]
    world_size: int
    reason: str
    incident: int = 0
    """The incident this attempt recovers from; 0: none."""
    config_sha256: str = ""
    git_commit: str = ""
    git_dirty: bool = False
    # OPT-175B's run 12.47 was 2 % faster and had another activation norm: a dependency had been
    # upgraded by accident.
    packages: Mapping[str, str] = field(default_factory=dict)
    difference: tuple[str, ...] = ()
    """Operational keys changed since the attempt before: `key: old -> new`."""
    rollback: int = 0
    """The order by which its ranks, those of the attempt before, went back in place; 0: they are
    new processes."""


@dataclass(frozen=True, slots=True)
class InForceReported(Event, kind="in_force"):
    """The values really in effect after the start, read back from every rank group and found as
    they should be."""

    values: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of NCCL, libfabric, UCX and gloo, as the first rank has them."""
    environment_difference: tuple[str, ...] = ()
    """What of them is not as in the attempt before, `NAME: old -> new`, and what is not alike on
    all ranks, `rank 3: NAME: first rank's -> its`."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each part of the start took the slowest rank: `read` (configuration, data's and
    checkpoint's manifests), `rendezvous`, `verify` (the checkpoint), `build` (the model), `load`
    (what was saved)."""


@dataclass(frozen=True, slots=True)
class TrainingBegan(Event, kind="training_began"):
    """The attempt's first step is done. `seconds` since its `attempt_started`."""

    generation: int
    seconds: float


@dataclass(frozen=True, slots=True)
class AttemptEnded(Event, kind="attempt_ended"):
    """`outcome` is ``finished``, ``stopped``, ``failed`` or ``replaced`` (a node was, without a
    failure). The line's `step` is the last step it took."""

    generation: int
    outcome: str


# Incidents ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FailureSeen(Event, kind="failure_seen"):
    """The first sign of an incident. The line's `step` is the last step known to be done."""

    incident: int
    generation: int
    node: str
    rank: int
    """-1 where no single rank showed it."""
    what: str
    """One sentence: what was observed, not why."""
    sign: str = ""
    """What kind of observation it was: ``exit``, ``down``, ``hang``, ``silence``, ``missing``,
    ``finding`` (of a probe), ``in_force``, ``takeover`` (a new supervisor did not find what it
    should lead), ``unsaved`` (done, but in no checkpoint)."""


@dataclass(frozen=True, slots=True)
class GenerationKilled(Event, kind="generation_killed"):
    """All ranks of the generation are gone: ranks die together."""

    generation: int
    incident: int
    killed: int
    """Ranks that were still alive and had to be killed."""


@dataclass(frozen=True, slots=True)
class IncidentDiagnosed(Event, kind="incident_diagnosed"):
    """The root cause as far as the evidence goes (labels: docs/causes.md)."""

    incident: int
    cause: str
    blame: str
    detail: str
    confidence: float
    node: str
    rank: int
    evidence: tuple[Evidence, ...]
    action: str
    """What the supervisor will do about it, one sentence."""


@dataclass(frozen=True, slots=True)
class IncidentClosed(Event, kind="incident_closed"):
    """Training goes on, or will not. `outcome` is ``recovered``, ``stopped`` or ``halted``."""

    incident: int
    outcome: str
    steps_lost: int
    """Steps done before the failure that had to be done again. Where the run ended first: those
    that the restored checkpoint lay behind; 0: nothing was restored."""
    seconds_lost: float
    """From the failure until training was again at the step where it failed; where the run ended
    first, until then."""
    down_seconds: float
    """From the failure to the first new step; where there was none, until the run ended."""


# State and orders ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckpointCommitted(Event, kind="checkpoint_committed"):
    """A manifest was renamed into place. The line's attempt and step are the checkpoint's."""

    path: str
    manifest_sha256: str
    bytes: int
    files: int
    seconds: float
    healthy: bool
    """False: training was not well when it was saved (non-finite loss, overflow storm)."""
    tier: str = "shared"
    """Where its files are: ``memory`` or ``node`` (held by the nodes' agents), or ``shared``, in
    the run directory."""
    world_size: int = 0
    """Of a memory or node checkpoint: the ranks that made it, each of which reads its own part
    again."""
    config_sha256: str = ""
    """Of a memory or node checkpoint: what those ranks were configured with."""


@dataclass(frozen=True, slots=True)
class CheckpointRejected(Event, kind="checkpoint_rejected"):
    """A checkpoint that should have been restored did not verify; an older one is taken. `why`
    names the file."""

    path: str
    why: str


@dataclass(frozen=True, slots=True)
class CheckpointRetired(Event, kind="checkpoint_retired"):
    """Removed by the retention rule, manifest first."""

    path: str


@dataclass(frozen=True, slots=True)
class SaveAbandoned(Event, kind="save_abandoned"):
    """A save was not completed: no manifest, no checkpoint."""

    path: str
    why: str


@dataclass(frozen=True, slots=True)
class OrderGiven(Event, kind="order_given"):
    """An order goes to the training loop."""

    number: int
    order: str
    reason: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What the order has beside number and reason, as it goes over the wire."""


@dataclass(frozen=True, slots=True)
class OrderEnded(Event, kind="order_ended"):
    """`outcome` is ``obeyed`` (all ranks, before the line's step), ``withdrawn``, or
    ``superseded``: all of the run was ended in the middle of a stop, and it was started again."""

    number: int
    outcome: str


@dataclass(frozen=True, slots=True)
class ValidationMeasured(Event, kind="validation"):
    """Loss in nats per token and perplexity over the whole named validation set, at the line's
    step."""

    name: str
    """``validation``: the part of the corpus that is held out; otherwise one of the run's
    `data.validation_sets`."""
    loss: float
    perplexity: float
    tokens: int


# The journal itself, and people -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Note(Event, kind="note"):
    """A person's words, for the chronicle."""

    author: str
    text: str


@dataclass(frozen=True, slots=True)
class JournalRepaired(Event, kind="journal_mended"):
    """The last line was torn by a crash and has been cut off."""

    bytes_removed: int


@dataclass(frozen=True, slots=True)
class JournalDamaged(Event, kind="journal_damaged"):
    """Line `line` does not verify; it stays, and is skipped."""

    line: int
    why: str


@dataclass(frozen=True, slots=True)
class JournalStalled(Event, kind="journal_stalled"):
    """The file system kept an append waiting; decisions waited with it, training did not."""

    seconds: float


@dataclass(frozen=True, slots=True)
class MetricsDropped(Event, kind="metrics_dropped"):
    """Metrics lines a rank could not hand over without waiting, over its life."""

    rank: int
    count: int


# Lines --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One journal line. `seq` counts from 1 and `hash` is hex sha256; both are given by the journal
    when it appends."""

    time: float
    """Unix seconds UTC, rounded to milliseconds."""
    attempt: str
    """Empty before the first attempt."""
    step: int | None
    event: Event
    seq: int = 0
    hash: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Fields of the line that a newer version wrote and this one does not know: kept."""
