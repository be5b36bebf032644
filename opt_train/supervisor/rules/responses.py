"""What is done about a cause: one table, and the budget that keeps it from going on for ever."""

from collections.abc import Mapping
from dataclasses import dataclass

from opt_train.diagnosis.causes import CAUSES
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


RESPONSES: Mapping[str, Response] = {
    "gpu_ecc": Response(REPLACE),
    "gpu_lost": Response(REPLACE),
    "gpu_fault": Response(REPLACE),
    "silent_corruption": Response(REPLACE),
    "node_failure": Response(REPLACE),
    "straggler": Response(REPLACE),
    "illegal_access": Response(RESTART, restarts=2, escalates=True),
    "gpu_oom": Response(RESTART, restarts=1),
    "user_code": Response(RESTART, restarts=1),
    "host_oom": Response(RESTART, restarts=2),
    "network": Response(RESTART, escalates=True),
    "collective_timeout": Response(RESTART, escalates=True),
    "hang": Response(RESTART, escalates=True),
    "killed": Response(RESTART, escalates=True),
    "storage": Response(RESTART),
    "corrupt_checkpoint": Response(RESTART),
    "data": Response(HALT),
    "config": Response(HALT),
    "loss_scale_floor": Response(RESTART, restarts=1),
    "loss_nan": Response(RESTART, restarts=1),
    "loss_spike": Response(RESTART, restarts=1),
    "drift": Response(RESTART, restarts=1),
    "plateau": Response(HALT),
    "preemption": Response(RESTART),
    "stopped": Response(RESTART),
    "none": Response(RESTART),
    "unknown": Response(RESTART, escalates=True),
}


def budget_of(cause: str, config: SupervisorConfig) -> int:
    """Restarts for `cause` without a new checkpoint after which a person must decide."""
    response = RESPONSES.get(cause, RESPONSES["unknown"])
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
    response = RESPONSES.get(cause, RESPONSES["unknown"])
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


def document() -> str:
    """docs/causes.md: causes and responses as this code holds them."""
    lines = [
        "# Causes",
        "",
        "What the supervisor can name as the cause of an incident, whom it blames, and what it "
        "does. Printed from",
        "`opt_train/diagnosis/causes.py` and `responses.py`; a test keeps it current. *Budget* is "
        "the number of",
        "restarts without a new checkpoint after which the run halts and a person must decide; "
        "*configured* is",
        "`supervisor.restarts_without_progress`. Over all causes it is three times that.",
        "",
        "silent_corruption, straggler, loss_spike, drift and plateau have no detector yet: the "
        "table says what will be",
        "done, and nothing names them today.",
        "",
        "| cause | blame | what it means | response | budget |",
        "|---|---|---|---|---|",
    ]
    said = {
        RESTART: "restart on the same nodes",
        REPLACE: "replace the node, restart",
        HALT: "halt",
    }
    for cause in CAUSES:
        response = RESPONSES[cause.label]
        budget = "0" if response.kind == HALT else str(response.restarts or "configured")
        what = said[response.kind] + (
            "; the last time replace the node" if response.escalates else ""
        )
        lines.append(f"| {cause.label} | {cause.blame} | {cause.meaning} | {what} | {budget} |")
    return "\n".join([*lines, ""])
