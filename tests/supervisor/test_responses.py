"""What is done about a cause: the table is complete, its budgets end every loop, and nothing is
done in a mode that only watches."""

import re

import pytest

from opt_train.diagnosis.causes import DETAILS, Cause
from opt_train.supervisor.config import SupervisorConfig
from opt_train.supervisor.modes import Mode
from opt_train.supervisor.rules.responses import (
    RESPONSES,
    Action,
    Response,
    finding_sentence,
    respond,
    response_to,
    response_to_finding,
)

CONFIG = SupervisorConfig()


def test_every_cause_has_a_response_for_any_detail() -> None:
    assert {cause for cause, detail in RESPONSES if not detail} == set(Cause)


def test_every_detail_with_a_response_of_its_own_is_one_that_something_reports() -> None:
    """A misspelt detail would never be found, and the cause's row be taken in silence."""
    details = {(cause, detail) for cause, detail in RESPONSES if detail}
    assert details == {(cause, detail) for cause, known in DETAILS.items() for detail in known}


def test_the_detail_goes_before_the_cause_and_an_unknown_label_has_a_response() -> None:
    assert response_to("gpu_ecc", "remap_pending", CONFIG).action is Action.REPLACE_AT_CHECKPOINT
    assert response_to("gpu_ecc", "of another driver", CONFIG).action is Action.REPLACE_NOW
    assert response_to("of another version", "", CONFIG) == RESPONSES[Cause.UNKNOWN, ""]


def test_hardware_is_replaced_and_configuration_is_for_a_person() -> None:
    assert respond("gpu_ecc", "", "n1", 1, 1, True, CONFIG).action is Action.REPLACE_NOW
    assert respond("killed", "", "n1", 1, 1, True, CONFIG).action is Action.RESTART
    assert respond("config", "heads", "n1", 1, 1, True, CONFIG).action is Action.HALT
    assert respond("data", "shard", "n1", 1, 1, True, CONFIG).action is Action.HALT


@pytest.mark.parametrize(
    ("cause", "strikes"), [("config", 1), ("user_code", 9)], ids=["halt", "budget used up"]
)
def test_a_rank_s_own_sentence_gets_no_second_full_stop(cause: str, strikes: int) -> None:
    remedy = respond(cause, "set train.device=cpu.", "n1", strikes, strikes, True, CONFIG)
    assert remedy.action is Action.HALT
    assert re.search(r"train\.device=cpu(\. Mend|\)\. Find)", remedy.question), remedy.question


def test_the_same_cause_escalates_then_stops() -> None:
    def actions(cause: str, strikes: tuple[int, ...], buffer_is_ready: bool) -> list[Action]:
        return [respond(cause, "d", "n1", k, k, buffer_is_ready, CONFIG).action for k in strikes]

    restart, replace_now, halt = Action.RESTART, Action.REPLACE_NOW, Action.HALT
    assert actions("hang", (1, 2, 3, 4), True) == [restart, restart, replace_now, halt]
    assert actions("hang", (3, 4), False) == [restart, halt]
    assert actions("user_code", (1, 2), True) == [restart, halt]


def test_ever_new_causes_do_not_make_an_endless_budget() -> None:
    assert respond("network", "d", "n1", 1, 10, True, CONFIG).action is Action.HALT


def test_a_contained_error_costs_a_restart_and_its_repetition_the_node() -> None:
    remedies = [respond("gpu_ecc", "contained", "n1", k, k, True, CONFIG) for k in (1, 2, 3)]
    assert [remedy.action for remedy in remedies] == [
        Action.RESTART,
        Action.REPLACE_NOW,
        Action.HALT,
    ]


def test_a_failed_run_waits_for_no_checkpoint() -> None:
    """What would be done at leisure is done at once, if a buffer node is there; else the node goes
    on: it is not broken."""
    pending = ("gpu_ecc", "remap_pending", "n1", 1, 1)
    assert respond(*pending, True, CONFIG).action is Action.REPLACE_NOW
    assert respond(*pending, False, CONFIG).action is Action.RESTART


@pytest.mark.parametrize("mode", [Mode.OBSERVE, Mode.ADVISE])
def test_a_failed_run_waits_for_a_person_where_the_robot_may_not_act(
    mode: Mode,
) -> None:
    """Invariant 14: the journal says what would have been done."""
    leashed = SupervisorConfig(modes=f"gpu_lost={mode}")
    remedy = respond("gpu_lost", "fell off the bus", "n1", 1, 1, True, leashed)
    assert remedy.action is Action.HALT
    assert f"in mode {mode}" in remedy.sentence
    assert "take n1 out" in remedy.sentence
    assert "take n1 out" in remedy.question


@pytest.mark.parametrize(
    ("cause", "detail", "permanent", "action"),
    [
        ("gpu_ecc", "uncontained", True, Action.REPLACE_NOW),
        ("gpu_ecc", "uncontained", False, Action.REPLACE_NOW),
        ("gpu_ecc", "contained", False, Action.RESTART),
        ("gpu_ecc", "remap_pending", True, Action.REPLACE_AT_CHECKPOINT),
        ("gpu_ecc", "remap_pending", False, Action.NOTE),
        ("none", "", True, Action.NOTE),
        ("unknown", "the driver does not answer", True, Action.NOTE),
        ("of another version", "", True, Action.NOTE),
    ],
)
def test_what_is_done_about_a_finding(
    cause: str, detail: str, permanent: bool, action: Action
) -> None:
    assert response_to_finding(cause, detail, CONFIG, permanent=permanent).action is action


@pytest.mark.parametrize("action", Action)
def test_every_action_has_a_sentence_and_a_watching_mode_says_that_nothing_is_done(
    action: Action,
) -> None:
    acting = finding_sentence("n1", Response(action))
    advised = finding_sentence("n1", Response(action, mode=Mode.ADVISE))
    assert acting in advised
    assert "nothing is done" in advised
