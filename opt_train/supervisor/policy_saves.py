"""Rules about checkpoints: commit what every rank has saved, give up what will not be complete, retire the old."""

from opt_logbook.events import CheckpointCommitted, CheckpointRetired, SaveAbandoned

from opt_train.supervisor.effects import CommitManifest, RetireCheckpoint
from opt_train.supervisor.policy_situation import Decision, Record, Situation
from opt_train.supervisor.state import path_of_save

FEWEST_KEPT = 2
"""The newest two good ones of the live chain are never retired, whatever `checkpoint.keep` says."""


def commit(s: Situation) -> list[Decision]:
    """When all ranks have reported the same step, and none has failed, its manifest may be written."""
    attempt = s.attempt
    decisions: list[Decision] = []
    for step, reports in s.seen.saves_of(attempt.generation):
        path = path_of_save(attempt.name, step)
        if len(reports) < attempt.world_size or path in s.state.settled_saves or path in s.seen.committing:
            continue
        files = {file.path: (file.bytes, file.sha256) for _, report in sorted(reports.items()) for file in report.files}
        seconds = max(report.seconds for report in reports.values())
        decisions.append(CommitManifest(path, reports[min(reports)].folder, attempt.name, step, files, seconds))
    return decisions


def conclude(s: Situation) -> list[Decision]:
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
        made = CheckpointCommitted(
            path, answer.manifest_sha256, answer.bytes, answer.files, answer.seconds, answer.healthy
        )
        decisions.append(Record(made, answer.step, answer.attempt))
    return decisions


def abandon_failed(s: Situation) -> list[Decision]:
    """A rank could not save: without its part there is no checkpoint; training goes on."""
    attempt = s.attempt
    decisions: list[Decision] = []
    for (generation, step), (rank, reason) in s.seen.failed_saves.items():
        path = path_of_save(attempt.name, step)
        if generation == attempt.generation and path not in s.state.settled_saves:
            decisions += abandon(s, path, f"rank {rank}: {reason}", step, attempt.name)
    return decisions


def abandon_unfinished(s: Situation, why: str) -> list[Decision]:
    """The generation is at its end: what it has not saved completely will never be complete."""
    attempt = s.attempt
    decisions: list[Decision] = []
    for step, reports in s.seen.saves_of(attempt.generation):
        path = path_of_save(attempt.name, step)
        if path not in s.state.settled_saves:
            told = f"{why} ({len(reports)} of {attempt.world_size} ranks had reported)"
            decisions += abandon(s, path, told, step, attempt.name)
    return decisions


def abandon(s: Situation, path: str, why: str, step: int, attempt: str) -> list[Decision]:
    """Say that a save came to nothing, and give its space back: a large model's shards fill a disk in a few."""
    decisions: list[Decision] = [Record(SaveAbandoned(path, why), step, attempt)]
    if path not in s.seen.committing:
        decisions.append(RetireCheckpoint(path))
    return decisions


def saves_in_flight(s: Situation) -> bool:
    """A manifest is being written and not yet given up: the newest checkpoint is worth the wait."""
    patience = s.config.supervisor.checkpoint_seconds
    return any(s.seen.age(since) < patience for since in s.seen.committing.values())


def retire(s: Situation) -> list[Decision]:
    """Keep the newest `checkpoint.keep` good ones of the live chain; drop older ones, and those beside the chain."""
    keep = max(s.config.checkpoint.keep, FEWEST_KEPT)
    if len(s.state.checkpoints) <= keep:
        return []
    attempt = s.attempt
    good = [c for c in s.state.chain() if not c.rejected]
    kept = {c.path for c in good[-keep:]} | {c.path for c in [c for c in good if c.healthy][-FEWEST_KEPT:]}
    own = [c for c in good if c.attempt == attempt.name]
    if len(own) < FEWEST_KEPT:
        # Until this attempt stands on two checkpoints of its own, a person may want those it left behind.
        on_chain = {c.path for c in good}
        kept |= {c.path for c in s.state.checkpoints if c.path not in on_chain}
    if not attempt.began:
        kept.add(attempt.checkpoint)
    decisions: list[Decision] = []
    for old in s.state.checkpoints:
        if old.path not in kept:
            decisions += [Record(CheckpointRetired(old.path), old.step, old.attempt), RetireCheckpoint(old.path)]
    return decisions
