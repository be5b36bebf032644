"""What agents hold of checkpoints, as they have told: a part of the observation. It decides
nothing."""

from collections.abc import Iterable

from opt_train.protocol.commands import Drop, Fetch
from opt_train.protocol.facts import AgentState, Fetched, SnapshotHeld
from opt_train.run.checkpoint import MEMORY, path_of_save
from opt_train.supervisor.effects import CommitSnapshot
from opt_train.supervisor.inputs import ManifestCommitted


class Inventory:
    """Begins empty with each supervisor, and agents tell it anew."""

    def __init__(self) -> None:
        self.snapshots: dict[tuple[int, int], dict[int, SnapshotHeld]] = {}
        """(generation, step) -> rank -> what its agent holds; not yet settled."""
        self.fetched: dict[str, dict[tuple[str, tuple[str, ...]], Fetched]] = {}
        """Checkpoint -> (node, names) -> the newest answer."""
        self.passed_on: dict[str, ManifestCommitted] = {}
        """Snapshots on their way to the nodes' disks, by the path they will have there."""
        self._held: dict[str, dict[str, set[str]]] = {}
        self._addresses: dict[str, str] = {}
        self._onward: dict[str, str] = {}

    def on(self, node: str, path: str) -> frozenset[str]:
        """Names of the files of `path` that the agent of `node` holds, good or not."""
        return frozenset(self._held.get(node, {}).get(path, ()))

    def paths_on(self, node: str) -> frozenset[str]:
        """Every checkpoint of which the agent of `node` holds anything."""
        return frozenset(self._held.get(node, {}))

    def address(self, node: str) -> str:
        """Where other agents get what the node holds; empty: nowhere."""
        return self._addresses.get(node, "")

    def answer(self, node: str, path: str, names: tuple[str, ...]) -> Fetched | None:
        """What the agent of `node` said last about getting these files; None: nothing since it was
        asked."""
        return self.fetched.get(path, {}).get((node, names))

    def snapshots_of(self, generation: int) -> list[tuple[int, dict[int, SnapshotHeld]]]:
        """(step, what is held by rank) of every snapshot of `generation` that is not settled,
        oldest first."""
        return sorted((step, held) for (g, step), held in self.snapshots.items() if g == generation)

    # Hearing --------------------------------------------------------------------------------------

    def take_connection(self, node: str, told: AgentState) -> None:
        self._addresses[node] = told.address
        self._held[node] = {held.path: set(held.names) for held in told.held}

    def take_snapshot(self, node: str, fact: SnapshotHeld) -> None:
        self.snapshots.setdefault((fact.generation, fact.step), {})[fact.rank] = fact
        self._add(
            node, path_of_save(fact.attempt, fact.step, MEMORY), (file.path for file in fact.files)
        )

    def take_fetched(self, node: str, fact: Fetched) -> None:
        self.fetched.setdefault(fact.path, {})[node, fact.names] = fact
        if not fact.why:
            self._add(node, fact.path, fact.names)

    def take_committed(self, given: ManifestCommitted) -> None:
        onward = self._onward.pop(given.path, "")
        if onward and not given.why:
            self.passed_on[onward] = given

    def _add(self, node: str, path: str, names: Iterable[str]) -> None:
        self._held.setdefault(node, {}).setdefault(path, set()).update(names)

    # Remembering ----------------------------------------------------------------------------------

    def note_commit(self, effect: CommitSnapshot) -> None:
        path, *onward = effect.paths
        if onward:
            self._onward[path] = onward[0]

    def note_command(self, node: str, command: object) -> None:
        """What was sent to the agent of `node`: an older answer is not the answer, and what is
        dropped is gone.

        A checkpoint of which one agent is told to drop its part is none any more: nobody's answer
        about it counts.
        """
        match command:
            case Fetch(path, _, names):
                self.fetched.get(path, {}).pop((node, names), None)
            case Drop(path):
                self._held.get(node, {}).pop(path, None)
                self.fetched.pop(path, None)

    def enter(self, generation: int) -> None:
        """Generations below this one are over."""
        self.passed_on = {}
        self.snapshots = {key: held for key, held in self.snapshots.items() if key[0] >= generation}

    def forget_settled(self, attempt: str, settled: frozenset[str]) -> None:
        """What the journal says of the attempt's snapshots is not kept here as well."""
        for key in [
            key for key in self.snapshots if path_of_save(attempt, key[1], MEMORY) in settled
        ]:
            del self.snapshots[key]
        for path in self.passed_on.keys() & settled:
            del self.passed_on[path]
