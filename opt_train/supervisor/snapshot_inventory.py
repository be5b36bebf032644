"""Files of checkpoints that agents have, in memory or on their nodes' disks, as the agents report
them. It decides nothing."""

from collections.abc import Iterable

from opt_train.protocol.commands import Command, Drop, Fetch
from opt_train.protocol.facts import AgentState, Fetched, SnapshotStored
from opt_train.run.checkpoint import MEMORY, path_of_save
from opt_train.run.settled_saves import SettledSaves
from opt_train.supervisor.effects import CommitSnapshot
from opt_train.supervisor.inputs import ManifestCommitted


class SnapshotInventory:
    """Begins empty with each supervisor, and agents report it again."""

    def __init__(self) -> None:
        self.fetched: dict[str, dict[tuple[str, tuple[str, ...]], Fetched]] = {}
        """Checkpoint -> (node, names) -> the newest answer."""
        self.passed_on: dict[str, ManifestCommitted] = {}
        """Snapshots on their way to the nodes' disks, by the path they will have there."""
        self._files: dict[str, dict[str, set[str]]] = {}
        """Node -> checkpoint -> names of its files there."""
        self._addresses: dict[str, str] = {}
        self._onward: dict[str, str] = {}
        """Snapshot whose manifest is being written -> where it goes on to then."""

    def on(self, node: str, path: str) -> frozenset[str]:
        """Names of the files of `path` that the agent of `node` has, good or not."""
        return frozenset(self._files.get(node, {}).get(path, ()))

    def paths_on(self, node: str) -> frozenset[str]:
        """Every checkpoint of which the agent of `node` has anything."""
        return frozenset(self._files.get(node, {}))

    @property
    def is_empty(self) -> bool:
        """Whether no agent has anything."""
        return not any(self._files.values())

    def address(self, node: str) -> str:
        """Where other agents get what the node has; empty: nowhere."""
        return self._addresses.get(node, "")

    def answer(self, node: str, path: str, names: tuple[str, ...]) -> Fetched | None:
        """The last answer of the agent of `node` about getting these files; None: none since it was
        asked."""
        return self.fetched.get(path, {}).get((node, names))

    # Inputs ---------------------------------------------------------------------------------------

    def apply_connection(self, node: str, agent: AgentState) -> None:
        self._addresses[node] = agent.address
        # Its own list replaces what was known: a new agent process has no memory of the old one,
        # and one that was cut off may have dropped files meanwhile.
        self._files[node] = {files.path: set(files.names) for files in agent.held}

    def apply_snapshot(self, node: str, fact: SnapshotStored) -> None:
        path = path_of_save(fact.attempt, fact.step, MEMORY)
        self._add(node, path, (file.path for file in fact.files))

    def apply_fetched(self, node: str, fact: Fetched) -> None:
        self.fetched.setdefault(fact.path, {})[node, fact.names] = fact
        if not fact.why:
            self._add(node, fact.path, fact.names)

    def apply_committed(self, input_: ManifestCommitted) -> None:
        onward = self._onward.pop(input_.path, "")
        if onward and not input_.why:
            self.passed_on[onward] = input_

    def _add(self, node: str, path: str, names: Iterable[str]) -> None:
        self._files.setdefault(node, {}).setdefault(path, set()).update(names)

    # What was decided -----------------------------------------------------------------------------

    def mark_commit(self, effect: CommitSnapshot) -> None:
        path, *onward = effect.paths
        if onward:
            self._onward[path] = onward[0]

    def mark_command(self, node: str, command: Command) -> None:
        """What was sent to the agent of `node`: an older answer is not the answer, and what is
        dropped is gone.

        A checkpoint of which one agent is to drop its part is none any more: nobody's answer about
        it counts.
        """
        match command:
            case Fetch(path, _, names):
                self.fetched.get(path, {}).pop((node, names), None)
            case Drop(path):
                self._files.get(node, {}).pop(path, None)
                self.fetched.pop(path, None)

    def forget_settled(self, settled: SettledSaves) -> None:
        """What the journal says of snapshots on their way to disks is not kept here as well."""
        for path in [path for path in self.passed_on if path in settled]:
            del self.passed_on[path]
