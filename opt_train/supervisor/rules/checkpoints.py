"""Rules about checkpoints: commit what every rank has saved, give up what will not be complete,
retire the old."""

from opt_logbook.record.events import CheckpointCommitted, CheckpointRetired, SaveAbandoned
from opt_logbook.record.run_directory import tier_of

from opt_train.run.checkpoint import MEMORY, path_of_save
from opt_train.run.retention import dispensable
from opt_train.supervisor.effects import CommitManifest, RetireCheckpoint
from opt_train.supervisor.inputs import ManifestCommitted
from opt_train.supervisor.rules.context import Context, Decision, Record


def commit(s: Context) -> list[Decision]:
    """When all ranks have reported the same step, and none has failed, its manifest may be
    written."""
    attempt = s.attempt
    decisions: list[Decision] = []
    for step, reports in s.seen.saves_of(attempt.generation):
        path = path_of_save(attempt.name, step)
        if (
            len(reports) < attempt.world_size
            or path in s.state.settled_saves
            or path in s.seen.committing
        ):
            continue
        files = {
            file.path: (file.bytes, file.sha256)
            for _, report in sorted(reports.items())
            for file in report.files
        }
        seconds = max(report.seconds for report in reports.values())
        decisions.append(
            CommitManifest(path, reports[min(reports)].folder, attempt.name, step, files, seconds)
        )
    return decisions


def conclude(s: Context) -> list[Decision]:
    """Journal what became of a manifest, also of an attempt that has ended since: once."""
    known = {c.path for c in s.state.checkpoints} | set(s.state.retired)
    decisions: list[Decision] = []
    for path, answer in s.seen.committed.items():
        if path in known or answer.attempt not in s.state.history:
            continue
        if answer.why:
            if path not in s.state.settled_saves:
                decisions += abandon(s, path, answer.why, answer.step, answer.attempt)
            continue
        decisions.append(Record(committed(path, answer), answer.step, answer.attempt))
    return decisions


def committed(path: str, made: ManifestCommitted) -> CheckpointCommitted:
    """What the journal says of a manifest that is in place."""
    return CheckpointCommitted(
        path,
        made.manifest_sha256,
        made.bytes,
        made.files,
        made.seconds,
        made.healthy,
        tier=tier_of(path),
        world_size=made.world_size,
        config_sha256=made.config_sha256,
    )


def abandon_failed(s: Context) -> list[Decision]:
    """A rank could not save: without its part there is no checkpoint; training goes on."""
    attempt = s.attempt
    decisions: list[Decision] = []
    for (generation, step), (rank, reason) in s.seen.failed_saves.items():
        path = path_of_save(attempt.name, step)
        if generation == attempt.generation and path not in s.state.settled_saves:
            decisions += abandon(s, path, f"rank {rank}: {reason}", step, attempt.name)
    return decisions


def abandon_unfinished(s: Context, why: str) -> list[Decision]:
    """The generation is at its end: what it has not saved completely will never be complete."""
    attempt = s.attempt
    reported = [
        (path_of_save(attempt.name, step), step, len(r))
        for step, r in s.seen.saves_of(attempt.generation)
    ]
    for step, held in s.seen.inventory.snapshots_of(attempt.generation):
        reported.append((path_of_save(attempt.name, step, MEMORY), step, len(held)))
    decisions: list[Decision] = []
    for path, step, ranks in reported:
        if path not in s.state.settled_saves:
            told = f"{why} ({ranks} of {attempt.world_size} ranks had reported)"
            decisions += abandon(s, path, told, step, attempt.name)
    return decisions


def abandon(s: Context, path: str, why: str, step: int, attempt: str) -> list[Decision]:
    """Say that a save came to nothing, and give its space back: a large model's shards fill a disk
    in a few."""
    decisions: list[Decision] = [Record(SaveAbandoned(path, why), step, attempt)]
    if path not in s.seen.committing:
        decisions.append(RetireCheckpoint(path))
    return decisions


def saves_in_flight(s: Context) -> bool:
    """A manifest is being written and not yet given up: the newest checkpoint is worth the wait."""
    patience = s.config.supervisor.checkpoint_seconds
    return any(s.seen.age(since) < patience for since in s.seen.committing.values())


def retire(s: Context) -> list[Decision]:
    """Drop what the rule of retention keeps no longer: on record first, then from the disk."""
    decisions: list[Decision] = []
    for old in dispensable(s.state, s.config):
        decisions += [
            Record(CheckpointRetired(old.path), old.step, old.attempt),
            RetireCheckpoint(old.path),
        ]
    return decisions
