"""The training loop, as the textbook says it. Whatever is not training is a call with a good
name."""

from opt_train.protocol.exits import DONE, NO
from opt_train.protocol.facts import ExitNotice
from opt_train.train.step import read_batch, take_step
from opt_train.train.training import Training


def train(run: Training) -> ExitNotice:
    """Train until the steps are done or the world agrees to stop; returns the rank's last fact.

    Every decision here is taken from the step stats, at the same boundary on every rank.
    """
    context = run.context
    run.checkpoints.save_restored(run.state)
    run.snapshots.take_first(run.state)
    run.probe(context.begin.probe_order, context.begin.probe)
    while True:
        # The stats of the step before last: they had a whole step to arrive.
        run.stats.receive(before=run.state.step - 1)
        if (notice := run.obey()) is not None:
            return notice
        state = run.state  # a rollback puts another one in its place
        if state.step >= run.config.train.steps:
            return finish(run)

        context.enter("data")
        # Random access: a restart, or a rollback, is just another cursor.
        micro_batches, data_seconds = read_batch(run)
        context.enter("step")
        take_step(run, micro_batches, data_seconds)

        run.validator.validate_if_due(state)
        run.snapshots.take_if_due(state)
        run.checkpoints.save_if_due(state)


def finish(run: Training) -> ExitNotice:
    """The end of the run: the final validation, the final checkpoint."""
    step = run.state.step
    run.validator.validate_at_end(run.state)
    if not run.checkpoints.save():
        reason = f"the final save at step {step} failed on some rank"
        return ExitNotice(NO, step, reason, cause="storage")
    return ExitNotice(DONE, step, f"all {step} steps are done")
