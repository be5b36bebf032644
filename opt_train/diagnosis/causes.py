"""What can be behind an incident: every cause this system knows, with whom it blames. One table;
docs print it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cause:
    """`label` is what the journal says; `blame` says who must act; `meaning` is for a person."""

    label: str
    blame: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A piece of evidence read from a log line: the cause it shows and how sure it makes one."""

    label: str
    detail: str
    confidence: float


CAUSES: tuple[Cause, ...] = (
    Cause(
        "gpu_ecc",
        "hardware",
        "Memory of a GPU is failing: uncorrectable ECC errors, rows to be remapped.",
    ),
    Cause("gpu_lost", "hardware", "A GPU has fallen off the bus or does not answer."),
    Cause("gpu_fault", "hardware", "A GPU or its driver reported a fault of its own."),
    Cause("silent_corruption", "hardware", "A device computed wrong numbers without any error."),
    Cause("node_failure", "hardware", "A node is gone, with everything on it."),
    Cause("straggler", "hardware", "A node is much slower than its peers."),
    Cause("illegal_access", "software", "A kernel read or wrote memory that is not its own."),
    Cause("gpu_oom", "software", "The job asked for more GPU memory than there is."),
    Cause("user_code", "software", "Python code raised an exception that is nobody else's doing."),
    Cause("host_oom", "software", "The node ran out of memory and the kernel killed a process."),
    Cause(
        "network",
        "network",
        "Ranks lost each other although all of them and their nodes were alive.",
    ),
    Cause(
        "collective_timeout",
        "unknown",
        "A collective did not complete in time; nobody is known to have stopped.",
    ),
    Cause("hang", "unknown", "A rank stopped moving; its process was alive."),
    Cause(
        "killed", "unknown", "A rank was ended by SIGKILL, or vanished, and nobody owns up to it."
    ),
    Cause("storage", "storage", "A file system is full, stale or answers with errors."),
    Cause("corrupt_checkpoint", "storage", "A checkpoint does not hold what its manifest says."),
    Cause("data", "software", "Training data is missing or not what it claims to be."),
    Cause("config", "software", "The configuration cannot work, or is not what is in force."),
    Cause(
        "loss_scale_floor",
        "numerics",
        "The loss scale fell to its floor: gradients overflow whatever the scale.",
    ),
    Cause("loss_nan", "numerics", "The loss is not a number."),
    Cause("loss_spike", "numerics", "The loss jumped and stayed up."),
    Cause("drift", "numerics", "Gradient or activation norms drift upwards."),
    Cause("plateau", "numerics", "The loss has stopped falling."),
    Cause(
        "preemption",
        "scheduler",
        "The scheduler took the nodes: time limit, preempted, or requeued.",
    ),
    Cause("stopped", "person", "A person asked the run to stop."),
    Cause("none", "none", "Nothing failed: ranks were replaced because their supervisor was."),
    Cause("unknown", "unknown", "The evidence does not say."),
)

BY_LABEL: dict[str, Cause] = {cause.label: cause for cause in CAUSES}


def blame_of(label: str) -> str:
    """Whom the cause `label` blames; ``unknown`` for a label of another version."""
    cause = BY_LABEL.get(label)
    return cause.blame if cause is not None else "unknown"
