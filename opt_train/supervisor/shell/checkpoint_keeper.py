"""The supervisor's hand on checkpoints: check, commit, retire. Any of it may take long; not for an
event loop."""

import hashlib
import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path

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
from opt_train.supervisor.effects import CommitManifest, CommitSnapshot
from opt_train.supervisor.inputs import CheckpointVerified, ManifestCommitted

log = logging.getLogger(__name__)


class CheckpointKeeper:
    """Works on the checkpoints of one run, as long as its lock is held."""

    def __init__(self, run: RunDirectory, lock: Lock, config_sha256: str) -> None:
        self._run, self._lock, self._config_sha256 = run, lock, config_sha256

    def verify(self, path: str, manifest_sha256: str) -> CheckpointVerified:
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
            return CheckpointVerified(path, self._relative(error))
        return CheckpointVerified(path, "", found)

    def commit(self, effect: CommitManifest, journal_head: str) -> ManifestCommitted:
        """Make what the ranks saved a checkpoint; `why` of the answer says what kept it from
        becoming one."""
        try:
            folder = self._folder(effect.path)
            # A rank with another mount under this name has saved where nobody here will ever look.
            if Path(effect.folder).resolve() != folder.resolve():
                raise CheckpointError(
                    f"the ranks saved in {effect.folder} instead of {effect.path}"
                )
            build = partial(
                build_manifest,
                folder,
                effect.attempt,
                effect.step,
                effect.files,
                config_sha256=self._config_sha256,
                journal_head=journal_head,
            )
            built = retry_while_late(folder, build)
            # Re-read at the last moment: a supervisor that was succeeded while it slept must not
            # commit anything.
            if not self._lock.is_mine():
                raise CheckpointError("another supervisor has taken over")
            sha256 = commit_manifest(folder, built)
        except (CheckpointError, OSError) as error:
            return ManifestCommitted(
                effect.path, effect.attempt, effect.step, self._relative(error)
            )
        return ManifestCommitted(
            effect.path,
            effect.attempt,
            effect.step,
            "",
            sha256,
            built.bytes,
            len(built.files),
            effect.seconds,
            built.healthy,
        )

    def commit_snapshot(self, effect: CommitSnapshot, journal_head: str) -> ManifestCommitted:
        """Write the manifest of files that agents hold; as `commit`, but nothing of theirs can be
        looked at here."""
        path = effect.paths[0]
        try:
            made = manifest_of_reports(
                effect.attempt,
                effect.step,
                effect.files,
                effect.state,
                config_sha256=self._config_sha256,
                journal_head=journal_head,
            )
            if not self._lock.is_mine():
                raise CheckpointError("another supervisor has taken over")
            for each in effect.paths:
                folder = self._folder(each)
                self._run.make_folder(folder)
                sha256 = commit_manifest(folder, made)
        except (CheckpointError, OSError) as error:
            return ManifestCommitted(path, effect.attempt, effect.step, self._relative(error))
        return ManifestCommitted(
            path,
            effect.attempt,
            effect.step,
            "",
            sha256,
            made.bytes,
            len(made.files),
            effect.seconds,
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
