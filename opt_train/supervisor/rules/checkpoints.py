"""Rules about checkpoints: commit what every rank has saved, give up what will not be complete,
retire the old."""

from opt_logbook.record.events import CheckpointRetired, SaveAbandoned
from opt_logbook.record.run_directory import tier_of

from opt_train.run.checkpoint import MEMORY, SHARED, path_of_save
from opt_train.run.entries import checkpoint_committed
from opt_train.run.retention import dispensable
from opt_train.run.state import TERMINAL
from opt_train.supervisor.effects import CommitManifest, RetireCheckpoint
from opt_train.supervisor.rules.context import Context, Decision, Record


def commit(s: Context) -> list[Decision]:
    """When all ranks have reported the same step, and none has failed, its manifest may be
    written."""
    attempt = s.attempt
    decisions: list[Decision] = []
    # Nothing names a checkpoint before every rank has reported its part: nanotron has each rank
    # write the pointer to the newest, before the others are through.
    for step, reports in s.generation.shared_saves():
        path = path_of_save(attempt.name, step)
        if (
            len(reports) < attempt.world_size
            or path in s.state.settled_saves
            or path in s.view.committing
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
    for path, answer in s.view.committed.items():
        if path in known or answer.attempt not in s.state.history:
            continue
        if tier_of(path) != SHARED and s.state.stage in TERMINAL:
            # The run has come to rest with this very input, and what agents hold goes with them:
            # it is in `known` no more, and would be journalled a second time.
            continue
        if answer.why:
            if path not in s.state.settled_saves:
                decisions += abandon(s, path, answer.why, answer.step, answer.attempt)
            continue
        decisions.append(
            Record(checkpoint_committed(path, answer, answer.seconds), answer.step, answer.attempt)
        )
    return decisions


def abandon_failed(s: Context) -> list[Decision]:
    """A rank could not save: without its part there is no checkpoint; training goes on."""
    attempt = s.attempt
    decisions: list[Decision] = []
    # OLMo-core writes the metadata of an asynchronous save that has failed; here one rank is enough
    # to end it for all.
    for step, (rank, reason) in s.generation.failed_saves():
        path = path_of_save(attempt.name, step)
        if path not in s.state.settled_saves:
            decisions += abandon(s, path, f"rank {rank}: {reason}", step, attempt.name)
    return decisions


def abandon_unfinished(s: Context, why: str) -> list[Decision]:
    """The generation is at its end: what it has not saved completely will never be complete."""
    attempt = s.attempt
    reported = [
        (path_of_save(attempt.name, step), step, len(r)) for step, r in s.generation.shared_saves()
    ]
    for step, parts in s.generation.snapshots():
        reported.append((path_of_save(attempt.name, step, MEMORY), step, len(parts)))
    decisions: list[Decision] = []
    for path, step, ranks in reported:
        if path not in s.state.settled_saves:
            full = f"{why} ({ranks} of {attempt.world_size} ranks had reported)"
            decisions += abandon(s, path, full, step, attempt.name)
    return decisions


def abandon(s: Context, path: str, why: str, step: int, attempt: str) -> list[Decision]:
    """Say that a save came to nothing, and give its space back: a large model's shards fill a disk
    in a few."""
    decisions: list[Decision] = [Record(SaveAbandoned(path, why), step, attempt)]
    # Its manifest may be in place in a moment; then it is a checkpoint all the same (`conclude`).
    if path not in s.view.committing:
        decisions.append(RetireCheckpoint(path))
    return decisions


def saves_in_flight(s: Context) -> bool:
    """A manifest is being written and not yet given up: the newest checkpoint is worth the wait."""
    patience = s.config.supervisor.checkpoint_seconds
    return any(s.view.age(since) < patience for since in s.view.committing.values())


def retire(s: Context) -> list[Decision]:
    """Drop what the rule of retention keeps no longer: on record first, then from the disk."""
    decisions: list[Decision] = []
    # A crash between the two leaves a folder, which the next supervisor removes (core.py). The
    # other order would leave a record of a checkpoint that is gone.
    for old in dispensable(s.state, s.config):
        decisions += [
            Record(CheckpointRetired(old.path), old.step, old.attempt),
            RetireCheckpoint(old.path),
        ]
    return decisions
