"""What is done about a cause: `RESPONSES`, one table for both doors by which a cause comes in.

An *incident* has stopped training already: its diagnosis names the cause, and `respond` says how
the run goes on. A *finding* is what a probe reports of a node while all may still be well:
`response_to_finding` says whether training is disturbed for it at all. Both look the cause up with
its detail first, and then without.

| action | for a finding | for an incident, when nothing trains any more |
|---|---|---|
| note | the journal's line is all | restart |
| restart | ranks are killed and begin again on the same nodes | restart |
| replace_now | ranks are killed, a buffer node takes the place | a buffer node takes the place |
| replace_at_checkpoint | training goes on to the next checkpoint, then as above | the same |
| drain | training goes on; the next attempt begins without the node | the same |
| halt | ranks are killed, a person must decide | a person must decide |

Every response has a `Mode` (modes.py), which a user sets. How often a restart is worth while is the
restart budget (restart_budget.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from opt_train.diagnosis.causes import (
    DRAIN,
    Cause,
    CorruptionDetail,
    EccDetail,
    StorageDetail,
    cause_named,
)
from opt_train.supervisor.config import SupervisorConfig
from opt_train.supervisor.modes import Mode, mode_of
from opt_train.supervisor.rules.restart_budget import is_used_up, restart_budget


class Action(StrEnum):
    """What the supervisor can do about a cause."""

    NOTE = "note"
    """Nothing but the line in the journal."""
    RESTART = "restart"
    """Begin again on the same nodes, from the newest good checkpoint."""
    REPLACE_NOW = "replace_now"
    """Take the node out at once; a buffer node takes its place, or a person must decide."""
    REPLACE_AT_CHECKPOINT = "replace_at_checkpoint"
    """Train on, and replace the node when the next checkpoint has been committed and a buffer node
    is there for it. Without one it stays."""
    DRAIN = "drain"
    """Train on, and begin no other attempt on the node as long as a buffer node can take its
    place."""
    HALT = "halt"
    """Stop for a person."""


@dataclass(frozen=True, slots=True)
class Response:
    """The response to a cause, or to one detail of it."""

    action: Action
    restarts: int | None = None
    """The cause's own restart budget; None: `supervisor.restarts_without_progress`."""
    escalates: bool = False
    """The last restart of the budget replaces the node that the diagnosis names."""
    mode: Mode = Mode.ACT
    """Not the table's: the configuration says it."""


RESPONSES: Mapping[tuple[Cause, str], Response] = {
    (Cause.GPU_ECC, ""): Response(Action.REPLACE_NOW),
    (Cause.GPU_ECC, EccDetail.UNCONTAINED): Response(Action.REPLACE_NOW),
    (Cause.GPU_ECC, EccDetail.REMAP_FAILED): Response(Action.REPLACE_NOW),
    # The process that touched the bad memory is gone, and with it the page: a restart is enough,
    # until it happens again.
    (Cause.GPU_ECC, EccDetail.CONTAINED): Response(Action.RESTART, restarts=2, escalates=True),
    # The row is set aside at the next reset; until then it costs nothing to train on.
    (Cause.GPU_ECC, EccDetail.REMAP_PENDING): Response(Action.REPLACE_AT_CHECKPOINT),
    (Cause.GPU_LOST, ""): Response(Action.REPLACE_NOW),
    (Cause.GPU_FAULT, ""): Response(Action.REPLACE_NOW),
    (Cause.SILENT_CORRUPTION, ""): Response(Action.REPLACE_NOW),
    (Cause.SILENT_CORRUPTION, CorruptionDetail.DISAGREES): Response(Action.REPLACE_NOW),
    # What it has spoilt was given up, and the steps since are right as far as they can be compared.
    (Cause.SILENT_CORRUPTION, CorruptionDetail.NOT_REPRODUCED): Response(
        Action.REPLACE_AT_CHECKPOINT
    ),
    (Cause.NODE_FAILURE, ""): Response(Action.REPLACE_NOW),
    (Cause.STRAGGLER, ""): Response(Action.REPLACE_NOW),
    # A bug of a kernel, mostly; bad memory looks the same, so the last try is on another node.
    (Cause.ILLEGAL_ACCESS, ""): Response(Action.RESTART, restarts=2, escalates=True),
    # The same code with the same batch does it again: one try tells that from an accident.
    (Cause.GPU_OOM, ""): Response(Action.RESTART, restarts=1),
    (Cause.USER_CODE, ""): Response(Action.RESTART, restarts=1),
    (Cause.HOST_OOM, ""): Response(Action.RESTART, restarts=2),
    # The node that is named may be a witness and no more: it stays until the last try.
    (Cause.NETWORK, ""): Response(Action.RESTART, escalates=True),
    (Cause.COLLECTIVE_TIMEOUT, ""): Response(Action.RESTART, escalates=True),
    (Cause.HANG, ""): Response(Action.RESTART, escalates=True),
    (Cause.KILLED, ""): Response(Action.RESTART, escalates=True),
    (Cause.STORAGE, ""): Response(Action.RESTART),
    (Cause.STORAGE, StorageDetail.NODE_DISK): Response(Action.REPLACE_AT_CHECKPOINT),
    (Cause.CORRUPT_CHECKPOINT, ""): Response(Action.RESTART),
    # A restart reads the same bytes.
    (Cause.DATA, ""): Response(Action.HALT),
    (Cause.CONFIG, ""): Response(Action.HALT),
    (Cause.LOSS_SCALE_FLOOR, ""): Response(Action.RESTART, restarts=1),
    (Cause.LOSS_NAN, ""): Response(Action.RESTART, restarts=1),
    (Cause.LOSS_SPIKE, ""): Response(Action.RESTART, restarts=1),
    (Cause.DRIFT, ""): Response(Action.RESTART, restarts=1),
    # Three changes of the optimizer relapsed for Marin 32B, and its architecture was changed: that
    # is no decision for a robot.
    (Cause.PLATEAU, ""): Response(Action.HALT),
    (Cause.PREEMPTION, ""): Response(Action.RESTART),
    (Cause.PREEMPTION, DRAIN): Response(Action.REPLACE_AT_CHECKPOINT),
    (Cause.STOPPED, ""): Response(Action.RESTART),
    (Cause.NONE, ""): Response(Action.RESTART),
    (Cause.UNKNOWN, ""): Response(Action.RESTART, escalates=True),
}
"""(Cause, detail) -> response. Every cause has a row without a detail, for all details that have
none of their own. In the order of docs/causes.md."""


def response_to(cause: str, detail: str, config: SupervisorConfig) -> Response:
    """The row of `cause` with `detail`, else of `cause`, in the mode that `config` has for it; of
    `unknown` for a label of another version."""
    known = cause_named(cause)
    row = RESPONSES.get((known, detail)) or RESPONSES[known, ""]
    return replace(row, mode=mode_of(known, detail, config))


# Findings -----------------------------------------------------------------------------------------

GIVES_NO_REASON = frozenset({Cause.UNKNOWN, Cause.NONE})
AT_LEISURE = frozenset({Action.REPLACE_AT_CHECKPOINT, Action.DRAIN})
"""Actions that can wait, as what they answer does not endanger the training of now."""


def response_to_finding(
    cause: str, detail: str, config: SupervisorConfig, *, permanent: bool
) -> Response:
    """What is done about a probe's finding.

    A finding that gives no cause changes nothing (invariant 11: what cannot be read is unknown),
    and what has passed is no reason to take a node out at leisure.
    """
    response = response_to(cause, detail, config)
    if cause_named(cause) in GIVES_NO_REASON:
        return Response(Action.NOTE)
    if response.action in AT_LEISURE and not permanent:
        return Response(Action.NOTE)
    return response


_FINDING_SENTENCES: Mapping[Action, str] = {
    Action.NOTE: "nothing is done about it",
    Action.RESTART: "end the ranks and restart on the same nodes from the newest good checkpoint",
    Action.REPLACE_NOW: "end the ranks, take {node} out and put a buffer node in its place",
    Action.REPLACE_AT_CHECKPOINT: "train on; after the next checkpoint take {node} out and put a "
    "buffer node in its place",
    Action.DRAIN: "train on; begin the next attempt without {node}",
    Action.HALT: "end the ranks and stop for a person",
}


def finding_sentence(node: str, response: Response) -> str:
    """What is done about a finding on `node`, or, in another mode than `act`, would have been."""
    sentence = _FINDING_SENTENCES[response.action].format(node=node)
    return sentence if response.action is Action.NOTE else in_mode(sentence, response.mode)


def in_mode(sentence: str, mode: Mode) -> str:
    """What is done, or, in another mode than `act`, would have been."""
    if mode is Mode.ACT:
        return sentence
    return f"nothing is done in mode {mode}; it would be: {sentence}"


# Incidents ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Remedy:
    """What is done now about an incident."""

    action: Action
    """`RESTART`, `REPLACE_NOW` or `HALT`: nothing trains any more that could be waited for."""
    sentence: str
    """For the journal."""
    question: str = ""
    """When halting: what a person must decide."""


def respond(
    cause: str,
    detail: str,
    node: str,
    strikes: int,
    strikes_in_all: int,
    buffer_is_ready: bool,
    config: SupervisorConfig,
) -> Remedy:
    """What to do about an incident of `cause`.

    Args:
        node: the one that the diagnosis names; empty: none.
        strikes: incidents of this cause since the last progress, this one included.
        strikes_in_all: the same over all causes.
        buffer_is_ready: a buffer node could take the place of `node`.
    """
    response = response_to(cause, detail, config)
    detail = detail.rstrip(".")  # a rank's own reason may be a sentence already
    if response.action is Action.HALT:
        question = f"{cause}: {detail}. Mend it, then start the run again."
        return Remedy(Action.HALT, f"stop: {cause} is for a person to mend", question)
    if is_used_up(strikes, strikes_in_all, response.restarts, config):
        return _used_up(cause, detail, strikes, strikes_in_all, response, config)
    remedy = _go_on(cause, node, strikes, response, buffer_is_ready, config)
    if response.mode is Mode.ACT:
        return remedy
    question = (
        f"{cause}: {detail}. In mode {response.mode} nothing is done about it; it would be: "
        f"{remedy.sentence}. Do it, then start the run again."
    )
    return Remedy(Action.HALT, in_mode(remedy.sentence, response.mode), question)


def _used_up(
    cause: str,
    detail: str,
    strikes: int,
    strikes_in_all: int,
    response: Response,
    config: SupervisorConfig,
) -> Remedy:
    times = f"in all {strikes_in_all} failures, this time"
    if strikes > restart_budget(response.restarts, config):
        times = f"{strikes} times"
    question = (
        f"{cause} struck {times} without a new checkpoint in between ({detail}). "
        "Find out why, then start the run again."
    )
    return Remedy(Action.HALT, f"stop: the restarts for {cause} are used up", question)


def _go_on(
    cause: str,
    node: str,
    strikes: int,
    response: Response,
    buffer_is_ready: bool,
    config: SupervisorConfig,
) -> Remedy:
    at_leisure = response.action in AT_LEISURE and buffer_is_ready
    if node and (response.action is Action.REPLACE_NOW or at_leisure):
        sentence = (
            f"take {node} out, put a buffer node in its place, restart from the newest good "
            "checkpoint"
        )
        return Remedy(Action.REPLACE_NOW, sentence)
    last_restart = 1 < strikes == restart_budget(response.restarts, config)
    if node and response.escalates and buffer_is_ready and last_restart:
        sentence = (
            f"{cause} has struck {strikes} times: take {node} out, put a buffer node in its "
            "place, restart"
        )
        return Remedy(Action.REPLACE_NOW, sentence)
    return Remedy(Action.RESTART, "restart on the same nodes from the newest good checkpoint")
