"""What is done about a cause: one table, and the budget that keeps it from going on for ever."""

from collections.abc import Mapping
from dataclasses import dataclass

from opt_train.diagnosis.causes import Cause, cause_named
from opt_train.supervisor.config import SupervisorConfig

RESTART, REPLACE, HALT = "restart", "replace", "halt"

CAUSES_PER_BUDGET = 3
"""Restarts without progress for whatever causes, as a multiple of the budget for one."""


@dataclass(frozen=True, slots=True)
class Response:
    """`kind`: ``restart`` on the same nodes, ``replace`` the node first, or ``halt`` for a person.

    `restarts`: how often before a person must decide; None: `supervisor.restarts_without_progress`.
    `escalates`: the last restart of the budget replaces the node that the diagnosis names.
    """

    kind: str
    restarts: int | None = None
    escalates: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is done now. `action` is one sentence for the journal; `question`, when halting, is for
    a person."""

    kind: str
    action: str
    question: str = ""


RESPONSES: Mapping[Cause, Response] = {
    Cause.GPU_ECC: Response(REPLACE),
    Cause.GPU_LOST: Response(REPLACE),
    Cause.GPU_FAULT: Response(REPLACE),
    Cause.SILENT_CORRUPTION: Response(REPLACE),
    Cause.NODE_FAILURE: Response(REPLACE),
    Cause.STRAGGLER: Response(REPLACE),
    Cause.ILLEGAL_ACCESS: Response(RESTART, restarts=2, escalates=True),
    Cause.GPU_OOM: Response(RESTART, restarts=1),
    Cause.USER_CODE: Response(RESTART, restarts=1),
    Cause.HOST_OOM: Response(RESTART, restarts=2),
    Cause.NETWORK: Response(RESTART, escalates=True),
    Cause.COLLECTIVE_TIMEOUT: Response(RESTART, escalates=True),
    Cause.HANG: Response(RESTART, escalates=True),
    Cause.KILLED: Response(RESTART, escalates=True),
    Cause.STORAGE: Response(RESTART),
    Cause.CORRUPT_CHECKPOINT: Response(RESTART),
    Cause.DATA: Response(HALT),
    Cause.CONFIG: Response(HALT),
    Cause.LOSS_SCALE_FLOOR: Response(RESTART, restarts=1),
    Cause.LOSS_NAN: Response(RESTART, restarts=1),
    Cause.LOSS_SPIKE: Response(RESTART, restarts=1),
    Cause.DRIFT: Response(RESTART, restarts=1),
    Cause.PLATEAU: Response(HALT),
    Cause.PREEMPTION: Response(RESTART),
    Cause.STOPPED: Response(RESTART),
    Cause.NONE: Response(RESTART),
    Cause.UNKNOWN: Response(RESTART, escalates=True),
}


def budget_of(cause: str, config: SupervisorConfig) -> int:
    """Restarts for `cause` without a new checkpoint after which a person must decide."""
    response = RESPONSES[cause_named(cause)]
    if response.kind == HALT:
        return 0
    budget = config.restarts_without_progress
    return budget if response.restarts is None else min(response.restarts, budget)


def respond(
    cause: str,
    detail: str,
    node: str,
    strikes: int,
    strikes_in_all: int,
    spare: bool,
    config: SupervisorConfig,
) -> Verdict:
    """What to do about `cause`.

    Args:
        strikes: incidents of this cause since the last progress, this one included.
        strikes_in_all: the same over all causes.
        spare: a buffer node could take the place of `node`.
    """
    response = RESPONSES[cause_named(cause)]
    budget = budget_of(cause, config)
    detail = detail.rstrip(".")  # a rank's own words may be a sentence already
    if response.kind == HALT:
        return Verdict(
            HALT,
            f"stop: {cause} is for a person to mend",
            f"{cause}: {detail}. Mend it, then start the run again.",
        )
    if strikes > budget or strikes_in_all > CAUSES_PER_BUDGET * config.restarts_without_progress:
        times = (
            f"{strikes} times"
            if strikes > budget
            else f"in all {strikes_in_all} failures, this time"
        )
        question = (
            f"{cause} struck {times} without a new checkpoint in between ({detail}). "
            "Find out why, then start the run again."
        )
        return Verdict(HALT, f"stop: the restarts for {cause} are used up", question)
    if node and response.kind == REPLACE:
        return Verdict(
            REPLACE,
            f"take {node} out, put a buffer node in its place, restart from the newest good "
            "checkpoint",
        )
    if node and response.escalates and spare and 1 < strikes == budget:
        return Verdict(
            REPLACE,
            f"{cause} has struck {strikes} times: take {node} out, put a buffer node in its "
            "place, restart",
        )
    return Verdict(RESTART, "restart on the same nodes from the newest good checkpoint")
