"""Journal entries that two writers make, a supervisor and a standalone run, built from what they
say.

Each field that has to be computed is computed here, so that the same run tells the same story
whoever kept its journal. Nothing here reads a clock or a file.
"""

import math
from typing import Protocol

from opt_logbook.record.events import (
    AttemptStarted,
    CheckpointCommitted,
    RunCreated,
    RunFinished,
    TrainingBegan,
    ValidationMeasured,
)
from opt_logbook.record.run_directory import tier_of

from opt_train.config.run_config import RunConfig
from opt_train.data.manifest import DatasetManifest
from opt_train.model.sizes import parameter_count
from opt_train.run.attempt import Attempt
from opt_train.run.checkpoint import Checkpoint
from opt_train.run.code.code_state import CodeState
from opt_train.run.ledger import TakenLedger, to_json
from opt_train.run.state import RunState

EXPONENT_MAX = 700.0
"""e to the 709th is the last that a float holds; a loss of more than this has the perplexity of
this, some 1e304, so that a finite loss never reads as an infinite one."""


class WrittenManifest(Protocol):
    """A manifest that is in place, as whoever wrote it reports it."""

    @property
    def manifest_sha256(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def files(self) -> int: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def world_size(self) -> int: ...
    @property
    def config_sha256(self) -> str: ...


def perplexity_of(loss: float) -> float:
    """e to the loss in nats a token, with the exponent capped at `EXPONENT_MAX`; NaN of NaN."""
    # In this order: `min` returns its first argument where a comparison with NaN fails.
    return math.exp(min(loss, EXPONENT_MAX))


def run_created(
    config: RunConfig, manifest: DatasetManifest, taken: TakenLedger | None = None
) -> RunCreated:
    """The first entry of a run's journal.

    Args:
        taken: the ledger of another run that it begins with.
    """
    return RunCreated(
        name=config.name,
        seed=config.seed,
        model=config.model.name,
        parameters=parameter_count(config.model),
        steps=config.train.steps,
        tokens_per_step=config.train.global_batch * config.data.sequence_length,
        tokenizer=manifest.tokenizer,
        data=manifest.name,
        data_fingerprint=manifest.fingerprint,
        train_tokens=manifest.train_tokens,
        validation_tokens=manifest.validation_tokens,
        unigram_perplexity=manifest.unigram_perplexity,
        learning_rate=config.optim.lr,
        ledger_of=taken.source if taken else "",
        ledger=tuple(to_json(taken.entries)) if taken else (),
        ledger_difference=taken.difference_on(manifest.fingerprint) if taken else (),
    )


def attempt_started(
    checkpoint: Checkpoint | None,
    code: CodeState,
    *,
    generation: int,
    nodes: tuple[str, ...],
    world_size: int,
    reason: str,
    config_sha256: str,
    buffer: tuple[str, ...] = (),
    incident: int = 0,
    difference: tuple[str, ...] = (),
    rollback: int = 0,
) -> AttemptStarted:
    """An attempt that begins with `checkpoint`, or from the beginning where it is None."""
    return AttemptStarted(
        generation=generation,
        parent=checkpoint.attempt if checkpoint else "",
        checkpoint=checkpoint.path if checkpoint else "",
        manifest_sha256=checkpoint.manifest_sha256 if checkpoint else "",
        nodes=nodes,
        buffer=buffer,
        world_size=world_size,
        reason=reason,
        incident=incident,
        config_sha256=config_sha256,
        rollback=rollback,
        git_commit=code.git_commit,
        git_dirty=code.git_dirty,
        packages=code.packages,
        difference=difference,
    )


def training_began(attempt: Attempt, now: float) -> TrainingBegan:
    """The attempt's first step is done.

    Args:
        now: Unix seconds.
    """
    return TrainingBegan(attempt.generation, _seconds_between(attempt.started, now))


def validation_measured(name: str, loss: float, tokens: int) -> ValidationMeasured:
    """The mean loss, in nats a token, of a validation set."""
    return ValidationMeasured(name, loss, perplexity_of(loss), tokens)


def checkpoint_committed(
    path: str, written: WrittenManifest, seconds: float
) -> CheckpointCommitted:
    """A checkpoint whose manifest is in place.

    Args:
        path: relative to the run directory; says the tier too.
        seconds: that the slowest rank took to save its part.
    """
    return CheckpointCommitted(
        path,
        written.manifest_sha256,
        written.bytes,
        written.files,
        round(seconds, 3),
        written.healthy,
        tier=tier_of(path),
        world_size=written.world_size,
        config_sha256=written.config_sha256,
    )


def run_finished(state: RunState, loss: float, tokens: int, now: float) -> RunFinished:
    """All steps are done.

    Args:
        loss: of the last step.
        now: Unix seconds.
    """
    perplexity = state.validation.perplexity if state.validation else math.nan
    return RunFinished(loss, perplexity, tokens, _seconds_between(state.created_time, now))


def _seconds_between(earlier: float, later: float) -> float:
    # A clock that is set back between the two must not make a duration negative.
    return round(max(0.0, later - earlier), 3)
