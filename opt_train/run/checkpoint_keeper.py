"""What whoever holds a run's lock does to its checkpoints: check, commit, retire.

Any of it may take long: it is not for an event loop. A supervisor and a standalone run share it,
and neither may touch what lies outside the run's own folders of checkpoints.
"""

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from opt_train.checkpoint import manifest
from opt_train.checkpoint.commit import (
    build_manifest,
    commit_manifest,
    manifest_of_reports,
    retire_checkpoint,
)
from opt_train.checkpoint.late_files import retry_while_late
from opt_train.checkpoint.manifest import CheckpointError
from opt_train.run.checkpoint import FASTEST_LAST

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of a look at a checkpoint. `why` is empty when it is good."""

    why: str
    manifest_sha256: str = ""


@dataclass(frozen=True, slots=True)
class CommitResult:
    """What came of a commit. `why` is empty when the manifest is in place, else it says what kept
    it."""

    why: str
    manifest_sha256: str = ""
    bytes: int = 0
    files: int = 0
    healthy: bool = True
    world_size: int = 0
    """Of a snapshot: the ranks that made it."""
    config_sha256: str = ""
    """Of a snapshot: what those ranks were configured with."""


class CheckpointKeeper:
    """Works on the checkpoints of one run, as long as its lock is held."""

    def __init__(self, run: RunDirectory, lock: Lock, config_sha256: str) -> None:
        self._run, self._lock, self._config_sha256 = run, lock, config_sha256

    def verify(self, path: str, manifest_sha256: str) -> Verification:
        """Compare the manifest's hash, and the files' names and sizes; `why` of the answer is empty
        when they are right.

        The bytes are left to the ranks, which divide them among themselves: one thread here would
        take some 20 minutes over those of a 175B model, and every restart would wait for it.
        """
        try:
            folder = self._folder(path)
            retry_while_late(folder, partial(manifest.check, folder, manifest_sha256 or None))
            found = (
                manifest_sha256
                or hashlib.sha256((folder / manifest.MANIFEST).read_bytes()).hexdigest()
            )
        except (CheckpointError, OSError) as error:
            return Verification(self._relative(error))
        return Verification("", found)

    def commit(
        self,
        path: str,
        folder: str,
        attempt: str,
        step: int,
        files: Mapping[str, tuple[int, str]],
        journal_head: str,
    ) -> CommitResult:
        """Make what the ranks saved a checkpoint.

        Args:
            path: relative to the run directory, where the checkpoint must lie.
            folder: where the ranks say that they wrote it.
            files: path inside the folder to (bytes, sha256), as reported.
        """
        try:
            place = self._folder(path)
            # A rank with another mount under this name has saved where nobody here will ever look.
            if Path(folder).resolve() != place.resolve():
                raise CheckpointError(f"the ranks saved in {folder} instead of {path}")
            build = partial(
                build_manifest,
                place,
                attempt,
                step,
                files,
                config_sha256=self._config_sha256,
                journal_head=journal_head,
            )
            built = retry_while_late(place, build)
            # Re-read at the last moment: a supervisor that was succeeded while it slept must not
            # commit anything.
            if not self._lock.is_mine():
                raise CheckpointError("another supervisor has taken over")
            sha256 = commit_manifest(place, built)
        except (CheckpointError, OSError) as error:
            return CommitResult(self._relative(error))
        return CommitResult("", sha256, built.bytes, len(built.files), built.healthy)

    def commit_snapshot(
        self,
        paths: Sequence[str],
        attempt: str,
        step: int,
        files: Mapping[str, tuple[int, str]],
        state: Mapping[str, Any],
        journal_head: str,
    ) -> CommitResult:
        """Write the manifest of files that agents have, at each of `paths`; as `commit`, but
        nothing of theirs can be looked at here."""
        try:
            made = manifest_of_reports(
                attempt,
                step,
                files,
                state,
                config_sha256=self._config_sha256,
                journal_head=journal_head,
            )
            if not self._lock.is_mine():
                raise CheckpointError("another supervisor has taken over")
            for path in paths:
                folder = self._folder(path)
                self._run.make_folder(folder)
                sha256 = commit_manifest(folder, made)
        except (CheckpointError, OSError) as error:
            return CommitResult(self._relative(error))
        return CommitResult(
            "",
            sha256,
            made.bytes,
            len(made.files),
            made.healthy,
            world_size=sum(name.endswith(manifest.SHARD_SUFFIX) for name in made.files),
            config_sha256=self._config_sha256,
        )

    def retire(self, path: str) -> None:
        """Remove a checkpoint, manifest first; trouble is logged, for the space is wanted, not
        needed."""
        try:
            if self._lock.is_mine():
                # Fenced as a commit is: a successor may keep what was decided here a minute ago.
                retire_checkpoint(self._folder(path))
        except (CheckpointError, OSError) as error:
            log.error("%s cannot be removed: %s", path, error)

    def clear(self, attempts: Collection[str], kept: Collection[str]) -> None:
        """Remove every save of `attempts` but those in `kept`: ranks that died while they saved
        reported nothing of it."""
        for attempt in attempts:
            for folder in sorted(
                f for root in self._roots() for f in (root / attempt).glob("step-*")
            ):
                path = folder.relative_to(self._run.path).as_posix()
                if path not in kept:
                    log.info("%s was never committed: removed", path)
                    self.retire(path)

    def _folder(self, path: str) -> Path:
        folder = self._run.path / path
        if folder.resolve().parent.parent not in self._roots():
            raise CheckpointError(f"{path} is no checkpoint of this run")
        return folder

    def _roots(self) -> tuple[Path, ...]:
        """One folder a tier; of what agents hold only the manifests lie there."""
        return tuple(self._run.checkpoints_of(tier).resolve() for tier in FASTEST_LAST)

    def _relative(self, error: Exception) -> str:
        return str(error).replace(f"{self._run.path}/", "")
