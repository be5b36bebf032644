"""The file system that all nodes share: journal and metrics, checkpoints, and how it fails.

What is durable here is all that a supervisor's death leaves. A stalled file system answers nobody
until it is well again; a full one refuses what is written at once.
"""

from dataclasses import dataclass, field

from opt_logbook.record.codec import GENESIS, decode, encode
from opt_logbook.record.events import Entry

from opt_train.run.fold import fold
from opt_train.run.state import RunState

COMMIT_SECONDS = 1.0
FULL = "No space left on device"


@dataclass(frozen=True, slots=True)
class Trail:
    """What weights were trained on: the step, the attempt that did it, and the trail before it.

    Two states are the same training only if their trails are the same, whatever their names say.
    """

    attempt: str
    step: int
    before: "Trail | None" = None
    samples: int = 0
    """Where the batch of the step begins in the order of the data."""

    def passed(self, other: "Trail | None") -> bool:
        """Whether these weights came by `other`; None is the beginning, by which all came."""
        here: Trail | None = self
        while here is not None and other is not None and here.step >= other.step:
            if here is other:
                return True
            here = here.before
        return other is None


@dataclass
class SharedStorage:
    """Of one run. All times are virtual seconds."""

    journal: list[Entry] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    """Its bytes."""
    replayed: RunState = field(default_factory=RunState)
    """What the journal folds to."""
    disk: dict[str, str] = field(default_factory=dict)
    """Checkpoint with a manifest -> what the supervisor finds wrong with it; empty: nothing."""
    flipped: dict[str, str] = field(default_factory=dict)
    """Committed checkpoint -> what its ranks find wrong when they read its bytes."""
    trails: dict[str, Trail | None] = field(default_factory=dict)
    """Save, committed or not -> what its weights were trained on."""
    metrics: dict[tuple[str, int], float] = field(default_factory=dict)
    cleared: list[str] = field(default_factory=list)
    """Saves that were in no record and were removed."""
    fail_commits: int = 0
    """Commits that will fail; negative: saves of ranks that will."""
    full_until: float = 0.0
    stalled_until: float = 0.0

    def is_full(self, now: float) -> bool:
        return now < self.full_until

    def takes_writes(self, now: float) -> bool:
        """Whether an append that begins now is durable at once."""
        return now >= max(self.full_until, self.stalled_until)

    def answers_at(self, now: float) -> float:
        """When a commit or an inspection that begins now is answered."""
        return max(now, self.stalled_until) + COMMIT_SECONDS

    def append(self, entry: Entry) -> Entry:
        """Make `entry` durable; returns it as a new supervisor will read it."""
        # That supervisor stands where this one does only if the line carries all that it goes by.
        previous = self.journal[-1].hash if self.journal else GENESIS
        self.lines.append(encode(entry, len(self.journal) + 1, previous))
        durable = decode(self.lines[-1])
        self.journal.append(durable)
        self.replayed = fold(self.replayed, durable)
        return durable

    def commit(self, path: str, now: float) -> str:
        """Put the manifest of `path` in place; what went wrong, empty: nothing."""
        # A manifest is written at once or not at all: it is small, and renamed into place.
        if self.is_full(now):
            return FULL
        if self.fail_commits > 0:
            self.fail_commits -= 1
            return FULL
        self.disk.setdefault(path, "")
        return ""

    def clear(self, attempts: tuple[str, ...], kept: frozenset[str]) -> None:
        """Remove what saves left under `attempts`, but for `kept`."""
        found = [p for p in self.disk if p.split("/")[1] in attempts and p not in kept]
        self.cleared += found
        self.disk = {path: why for path, why in self.disk.items() if path not in found}
