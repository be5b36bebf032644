"""Where everything of a run lies (docs/journal.md). Paths and folders: nothing here opens a
file."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The folder of one run, and the names in it."""

    path: Path

    @property
    def config(self) -> Path:
        """The newest lineage's resolved configuration, YAML, for people."""
        return self.path / "config.yaml"

    @property
    def config_json(self) -> Path:
        """The same as JSON, for ranks: the file that `Begin.config_path` names."""
        return self.path / "config.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def head(self) -> Path:
        """`seq hash` of the newest line, replaced by rename after each append."""
        return self.path / "journal.head"

    @property
    def lock(self) -> Path:
        return self.path / "journal.lock"

    @property
    def inbox(self) -> Path:
        return self.path / "inbox"

    @property
    def secret(self) -> Path:
        """32 random bytes in hex, mode 0600: what agents and supervisor prove to each other."""
        return self.path / "secret"

    @property
    def supervisor_address(self) -> Path:
        """JSON `{"address", "leader"}`, replaced by rename whenever a supervisor starts."""
        return self.path / "supervisor.json"

    @property
    def status(self) -> Path:
        """What the supervisor shows at its terminal, JSON, replaced by rename when it changes."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def chronicle(self) -> Path:
        return self.path / "chronicle"

    @property
    def faults(self) -> Path:
        """What the fault plan did; read by tests alone, never by diagnosis or chronicle."""
        return self.path / "faults.jsonl"

    @property
    def nodes(self) -> Path:
        """One folder a node, with its agent's registration and log."""
        return self.path / "nodes"

    @property
    def submit(self) -> Path:
        """The supervisor's batch script as submitted, and its log."""
        return self.path / "submit"

    def make_folder(self, folder: Path) -> None:
        """Make `folder`, somewhere below the run directory; that itself is never made again.

        A person who removes a run means it: a process of it that still lives must not bring its
        folder back.

        Raises:
            OSError: the run directory is not there, or the folder cannot be made.
        """
        below = folder.relative_to(self.path)
        # Folder by folder: mkdir with `parents` would make the run directory again.
        for part in (*reversed(below.parents[:-1]), below):
            (self.path / part).mkdir(exist_ok=True)

    def metrics_of(self, attempt: str) -> Path:
        return self.metrics / f"{attempt}.jsonl"

    def rank_log(self, attempt: str, node: str, rank: int) -> Path:
        return self.logs / attempt / node / f"rank{rank}.log"

    def checkpoints_of(self, tier: str) -> Path:
        """Checkpoints of tier ``shared``; the manifests of those that agents hold, in ``memory`` or
        on a ``node``."""
        return self.checkpoints if tier == "shared" else self.path / tier

    def checkpoint(self, attempt: str, step: int, tier: str = "shared") -> Path:
        return self.checkpoints_of(tier) / attempt / f"step-{step:08d}"


def tier_of(path: str) -> str:
    """Where the files of the checkpoint with this path are: ``memory``, ``node`` or ``shared``."""
    first = path.split("/", 1)[0]
    return first if first in ("memory", "node") else "shared"
