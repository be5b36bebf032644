"""The training loop, as the textbook says it. Whatever is not training is a call with a good
name."""

from opt_train.data.manifest import HELD_OUT
from opt_train.protocol.exits import DONE, NO
from opt_train.protocol.facts import ExitNotice
from opt_train.train.step import read_batch, take_step
from opt_train.train.training import Training


def train(run: Training) -> ExitNotice:
    """Train until the steps are done or the world agrees to stop; returns the rank's last words.

    Every decision here is taken from the step stats, at the same boundary on every rank.
    """
    state, config = run.state, run.config
    if state.step and config.checkpoint.every_steps:
        # one restored from memory: a save that was under way when the run broke is lost
        run.begin_save()
    while True:
        # The stats of the step before last: they had a whole step to arrive.
        run.receive_stats(before=state.step - 1)
        if (leaving := run.obey()) is not None:
            return leaving
        if state.step >= config.train.steps:
            return finish(run)

        run.enter("data")
        micro_batches, data_seconds = read_batch(
            run
        )  # random access: a restart is just another cursor
        run.enter("step")
        take_step(run, micro_batches, data_seconds)

        run.validate(sets_due(run))
        if is_due(config.checkpoint.memory_every_steps, state.step):
            run.begin_snapshot()
        if is_due(config.checkpoint.every_steps, state.step):
            run.begin_save()


def finish(run: Training) -> ExitNotice:
    """The last words, the final validation, the final checkpoint."""
    step = run.state.step
    measured = sets_due(run) if step > run.started_step else []
    run.validate([name for name in run.validation_sets if name not in measured])
    if not run.save():
        return ExitNotice(
            NO, step, f"the final save at step {step} failed on some rank", cause="storage"
        )
    return ExitNotice(DONE, step, f"all {step} steps are done")


def sets_due(run: Training) -> list[str]:
    """The validation sets that are measured after the step that was taken last."""
    config, step = run.config.train, run.state.step
    held_out = is_due(config.validate_every, step)
    others = is_due(config.validate_sets_every or config.validate_every, step)
    return [name for name in run.validation_sets if (held_out if name == HELD_OUT else others)]


def is_due(every: int, step: int) -> bool:
    """Whether something that happens `every` so many steps (0: never) happens after `step` of
    them."""
    return every > 0 and step % every == 0
