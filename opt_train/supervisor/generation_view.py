"""One generation of ranks as it looks from the supervisor: what each rank reported, and what became
of its saves.

All that is known of a generation and not journalled hangs on its one `GenerationView`. To forget a
generation is to forget that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_train.protocol.exits import DONE, STOPPED
from opt_train.protocol.facts import (
    ExitNotice,
    InForce,
    Probed,
    RankExited,
    SaveFailed,
    ShardsSaved,
    SnapshotStored,
    Stacks,
    Store,
    Validation,
)
from opt_train.protocol.framing import Message
from opt_train.run.checkpoint import MEMORY, path_of_save
from opt_train.run.settled_saves import SettledSaves


@dataclass(slots=True)
class RankView:
    """One rank of one generation."""

    was_running: bool = False
    """An agent has shown it running in a slot."""
    notice: ExitNotice | None = None
    """How it said it would end."""
    stacks: tuple[str, Stacks] | None = None
    """Node, and what it was doing when it was asked."""


@dataclass(slots=True)
class SaveView:
    """What ranks and agents reported of one step, until the journal says what became of it."""

    reports: dict[int, ShardsSaved] = field(default_factory=dict)
    """By rank: its shards lie in the shared file system."""
    failure: tuple[int, str] | None = None
    """The first rank that could not save, and why."""
    snapshots: dict[int, SnapshotStored] = field(default_factory=dict)
    """By rank: its agent has its part in memory."""


@dataclass(slots=True)
class GenerationView:
    """The ranks of one generation. What is by rank is in the order in which it was reported."""

    ranks: dict[int, RankView] = field(default_factory=dict)
    saves: dict[int, SaveView] = field(default_factory=dict)
    """By step."""
    store: Store | None = None
    """Where rank 0 listens for the others."""
    exits: dict[int, tuple[str, RankExited]] = field(default_factory=dict)
    """By rank: node, and how its process ended."""
    deaths: dict[int, tuple[str, RankExited]] = field(default_factory=dict)
    """Those of `exits` that no rank announced."""
    in_force: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """By rank: what it read back after its start."""
    environments: dict[int, Mapping[str, str]] = field(default_factory=dict)
    """Rank -> the variables that decide how it talks to the others."""
    start_seconds: dict[str, float] = field(default_factory=dict)
    """Part of the start -> how long it took the slowest rank."""
    in_force_variants: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    """The different ones among `in_force`, each with the rank that reported it first."""
    begun: set[int] = field(default_factory=set)
    """Ranks that were sent their `Begin`."""
    validations: dict[tuple[str, int], Validation] = field(default_factory=dict)
    """By name and step; not yet journalled."""
    probed: Probed | None = None
    """What its data looks like to the state that it began with."""
    kill_sent_at: dict[str, float] = field(default_factory=dict)
    """Node -> when its agent was first sent the command to kill this generation."""

    def rank(self, rank: int) -> RankView:
        """The view of `rank`, made when first asked for."""
        if rank not in self.ranks:
            self.ranks[rank] = RankView()
        return self.ranks[rank]

    def was_running(self, rank: int) -> bool:
        return rank in self.ranks and self.ranks[rank].was_running

    @property
    def notices(self) -> dict[int, ExitNotice]:
        """Rank -> how it said it would end."""
        return {r: view.notice for r, view in self.ranks.items() if view.notice is not None}

    @property
    def stacks(self) -> dict[int, tuple[str, Stacks]]:
        """Rank -> node, what it was doing when it was asked."""
        return {r: view.stacks for r, view in self.ranks.items() if view.stacks is not None}

    # What is reported -----------------------------------------------------------------------------

    def apply_rank_fact(self, rank: int, fact: Message) -> bool:
        """Take in what `rank` says of itself; False: it is nothing that a generation is asked
        for."""
        match fact:
            case Store():
                self.store = fact
            case InForce(values, environment, seconds):
                self.in_force[rank] = values
                for part, taken in seconds.items():
                    self.start_seconds[part] = max(taken, self.start_seconds.get(part, 0.0))
                # Sixteen thousand ranks report the same: what is compared is what differs.
                if all(values != known for _, known in self.in_force_variants):
                    self.in_force_variants.append((rank, values))
                self.environments[rank] = environment
            case ShardsSaved(step):
                self._save(step).reports[rank] = fact
            case SaveFailed(step, reason):
                save = self._save(step)
                # The first reason stays: on a full disk rank after rank fails, and the journal may
                # have it by then.
                save.failure = save.failure or (rank, reason)
            case ExitNotice():
                self.rank(rank).notice = fact
            case Validation(name, step):
                self.validations[name, step] = fact
            case Probed():
                self.probed = fact
            case _:
                return False
        return True

    def apply_exit(self, node: str, fact: RankExited) -> None:
        self.exits[fact.rank] = node, fact
        if not is_announced(fact):
            self.deaths[fact.rank] = node, fact
        if fact.leaving is not None:
            self.rank(fact.rank).notice = fact.leaving

    def apply_stacks(self, node: str, fact: Stacks) -> None:
        self.rank(fact.rank).stacks = node, fact

    def apply_snapshot(self, fact: SnapshotStored) -> None:
        self._save(fact.step).snapshots[fact.rank] = fact

    # Its saves ------------------------------------------------------------------------------------

    def shared_saves(self) -> Iterator[tuple[int, dict[int, ShardsSaved]]]:
        """(step, reports by rank) of every save that a rank reported and that is not settled."""
        return ((step, save.reports) for step, save in self.saves.items() if save.reports)

    def failed_saves(self) -> Iterator[tuple[int, tuple[int, str]]]:
        """(step, (rank, reason)) of every save that failed on a rank and is not settled."""
        for step, save in self.saves.items():
            if save.failure is not None:
                yield step, save.failure

    def snapshots(self) -> list[tuple[int, dict[int, SnapshotStored]]]:
        """(step, what agents have by rank) of every snapshot that is not settled, oldest first."""
        return sorted((step, save.snapshots) for step, save in self.saves.items() if save.snapshots)

    def forget_settled(self, attempt: str, settled: SettledSaves) -> None:
        """Forget the saves of `attempt`, this generation's, whose paths are in `settled`: the
        journal says what became of them."""
        for step, save in list(self.saves.items()):
            if path_of_save(attempt, step) in settled:
                save.reports, save.failure = {}, None
            if path_of_save(attempt, step, MEMORY) in settled:
                save.snapshots = {}
            if save == SaveView():
                del self.saves[step]

    def forget_validations(self, journalled: frozenset[tuple[str, int]]) -> None:
        """Forget those in the journal, given by name and step."""
        for key in self.validations.keys() & journalled:
            del self.validations[key]

    def _save(self, step: int) -> SaveView:
        if step not in self.saves:
            self.saves[step] = SaveView()
        return self.saves[step]


def is_announced(exited: RankExited) -> bool:
    """Whether the rank ended as it said it would, its work done or its state saved."""
    # An exit code is believed only together with the last fact: Python itself exits 2 for a missing
    # file, and a library may exit with any code.
    notice = exited.leaving
    return notice is not None and exited.code in (DONE, STOPPED) and notice.code == exited.code
