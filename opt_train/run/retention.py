"""Which checkpoints stay: a pure function of what the journal has told, for a supervisor and a lone
rank alike.

In the run directory the newest of the live chain stay, milestones of it, what is young, and, for a
while, the branch that was left; of what agents hold, the newest of the live chain. What an attempt
that begins stands on stays anywhere. Everything else goes. Nothing here reads a clock: the hour is
that of the newest commit, so a run that rests for a week loses nothing by it, and only a new
checkpoint makes an old one dispensable.
"""

from collections.abc import Iterator, Sequence

from opt_train.config.run_config import RunConfig
from opt_train.run.checkpoint import MEMORY, NODE, SHARED, Checkpoint
from opt_train.run.state import RunState

FEWEST_HEALTHY = 2
"""Saved while training was well: a rollback that finds one of them damaged still finds another."""


def dispensable(state: RunState, config: RunConfig) -> list[Checkpoint]:
    """What may be retired now, in the order of commits."""
    stays = kept(state, config)
    return [checkpoint for checkpoint in state.checkpoints if checkpoint.path not in stays]


def kept(state: RunState, config: RunConfig) -> frozenset[str]:
    """Paths of the checkpoints that stay."""
    good = [c for c in state.chain() if not c.rejected]
    stays = _kept_shared(state, [c for c in good if c.tier == SHARED], config)
    for tier, count in (
        (NODE, config.checkpoint.node_keep),
        (MEMORY, config.checkpoint.memory_keep),
    ):
        stays += [c for c in good if c.tier == tier][-count:]
    return frozenset({c.path for c in stays} | referred(state))


def _kept_shared(state: RunState, good: list[Checkpoint], config: RunConfig) -> list[Checkpoint]:
    there = [c for c in state.checkpoints if c.tier == SHARED]
    if len(there) <= config.checkpoint.newest_kept:
        return there
    every = config.checkpoint.milestone_every_steps
    healthy = [c for c in good if c.healthy]
    stays = [*good[-config.checkpoint.newest_kept :], *healthy[-FEWEST_HEALTHY:]]
    stays += [c for c in good if every and c.step % every == 0]
    return [
        *stays,
        *_young(there, config.checkpoint.keep_hours * 3600.0),
        *_left_behind(state, there, good),
    ]


def referred(state: RunState) -> frozenset[str]:
    """What something that goes on now stands on: an attempt that begins, by a restart or a
    rollback, and the next.

    An order that names a checkpoint belongs here.
    """
    beginning = state.live if state.live is not None and not state.live.began else None
    if beginning is not None and any(c.attempt == beginning.name for c in state.checkpoints):
        beginning = None  # it has saved, whatever was heard of its steps
    newest = state.newest_good()
    named = {
        beginning.checkpoint if beginning is not None else "",
        newest.path if newest is not None else "",
    }
    return frozenset(named - {""})


def _young(there: Sequence[Checkpoint], seconds: float) -> Iterator[Checkpoint]:
    """Committed less than `seconds` before the newest, abandoned and rejected ones too: there
    cannot be many."""
    if seconds <= 0 or not there:
        return
    newest = earliest = there[-1].committed
    for checkpoint in reversed(there):
        # A clock that was ahead for a while: nothing was committed later than what was committed
        # after it.
        earliest = min(earliest, checkpoint.committed)
        if newest - earliest < seconds:
            yield checkpoint


def _left_behind(
    state: RunState, there: Sequence[Checkpoint], good: Sequence[Checkpoint]
) -> list[Checkpoint]:
    """Until the attempt stands on two checkpoints of its own, a person may want those beside its
    chain."""
    name = state.attempt.name if state.attempt is not None else ""
    if sum(c.attempt == name for c in good) >= FEWEST_HEALTHY:
        return []
    on_chain = {c.path for c in good}
    return [c for c in there if c.path not in on_chain]
