"""The supervisor's patience and budgets."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import NOT_NEGATIVE, OPERATIONAL, POSITIVE, Choices


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorConfig:
    """Patience, in seconds, and budgets. Learned timeouts are never below 3 times the largest value
    seen."""

    key_kind: ClassVar = OPERATIONAL

    mode: Annotated[str, Choices("observe", "advise", "act")] = "act"
    """How far the supervisor may go by itself. In ``observe`` and ``advise`` it journals what it
    would have done, and a run that has failed waits for a person."""
    modes: str = ""
    """Modes of single causes, as comma-separated ``cause=mode`` pairs that go before `mode`:
    ``"straggler=observe,gpu_ecc/remap_pending=advise"``. Causes and details: docs/causes.md."""

    start_seconds: Annotated[float, POSITIVE] = 300.0
    """Longest wait for a rank to begin its first step, before anything is learned."""
    step_seconds: Annotated[float, POSITIVE] = 120.0
    """Longest silence in a step, before anything is learned; `data` and `waiting` likewise."""
    checkpoint_seconds: Annotated[float, POSITIVE] = 600.0
    """Longest silence in a checkpoint: no bytes written."""
    evaluation_seconds: Annotated[float, POSITIVE] = 600.0
    minimum_seconds: Annotated[float, POSITIVE] = 10.0
    """No learned timeout is shorter."""
    settle_seconds: Annotated[float, NOT_NEGATIVE] = 1.0
    """Between the first sign of a failure and the diagnosis: time for the other ranks' last
    facts."""
    orphan_seconds: Annotated[float, POSITIVE] = 60.0
    """Agents that nobody leads kill their ranks and leave after this."""
    join_seconds: Annotated[float, POSITIVE] = 120.0
    """Longest wait for the nodes of an attempt to dial in."""
    restarts_without_progress: Annotated[int, POSITIVE] = 3
    """Restarts for one cause without a new checkpoint, after which a person must decide."""
    lemons: str = ""
    """Folder of the record of repeat offenders (lemons), which all runs of a site share; empty:
    ``.lemons`` beside the run directories. Not on a local cluster."""
    lemon_half_life_days: Annotated[float, POSITIVE] = 30.0
    """After this long a failure on record counts for half."""
    lemon_score: Annotated[float, POSITIVE] = 1.5
    """From this score on a node is a repeat offender, and trains only where no other can: 1 for
    each time that it was taken out for bad hardware, halved with every half-life since."""
    lemon_exclude_score: Annotated[float, NOT_NEGATIVE] = 3.0
    """From this score on a scheduler is asked for nodes without it, as long as enough others work;
    0: never."""
    status_seconds: Annotated[float, POSITIVE] = 2.0
    """Between status lines where the terminal cannot redraw one."""
