"""Who is a repeat offender: failures count for the GPU that had them, for less as time goes by."""

import math

import pytest
from opt_logbook.record.hardware import Offence

from opt_train.diagnosis.causes import Cause
from opt_train.run.lemons import (
    DAY,
    described,
    is_offence,
    offences_of,
    score,
    worst_first,
)

NOW = 1.8e9


def offence(days: float, node: str = "n1", gpu: str = "", run: str = "a") -> Offence:
    return Offence(NOW - days * DAY, run, node, "gpu_ecc", "uncontained", gpu)


def test_a_failure_counts_for_half_after_each_half_life() -> None:
    assert score([offence(0)], NOW, 30.0) == 1.0
    assert score([offence(30), offence(60)], NOW, 30.0) == pytest.approx(0.75)
    assert math.isclose(score([offence(900)], NOW, 30.0), 0.0, abs_tol=1e-8)


def test_a_clock_that_runs_ahead_makes_no_failure_worse_than_a_new_one() -> None:
    assert score([offence(-400)], NOW, 30.0) == 1.0


def test_a_gpu_takes_its_record_to_the_node_it_is_moved_to() -> None:
    known = [offence(1, "n1", gpu="GPU-bad"), offence(2, "n1")]
    assert offences_of("n2", {"GPU-bad", "GPU-x"}, known) == (known[0],)
    assert offences_of("n1", {"GPU-new"}, known) == (known[1],), "what was the node's own stays"
    assert offences_of("n1", {"GPU-bad"}, known) == tuple(known)


def test_while_a_nodes_gpus_are_not_known_what_they_did_is_the_nodes() -> None:
    assert offences_of("n1", (), [offence(1, "n1", gpu="GPU-bad")]) != ()


def test_it_is_said_what_a_node_has_done_and_where() -> None:
    lost = Offence(NOW - DAY, "b", "n1", "node_failure", "Slurm: down* (Not responding)")
    done = [offence(20), offence(9, run="b"), lost]
    assert described(done, NOW) == (
        "2 x gpu_ecc (uncontained), 1 x node_failure in 20 days, in runs a, b"
    )
    assert described([offence(0)], NOW) == "1 x gpu_ecc (uncontained) in 1 day, in run a"


def test_the_worst_nodes_come_first_and_those_below_the_score_not_at_all() -> None:
    known = [offence(0, "n1"), offence(0, "n2"), offence(1, "n2"), offence(0, "n3")]
    known += [offence(2, "n3"), offence(3, "n3")]
    assert worst_first(known, NOW, 30.0, 1.5) == ("n3", "n2")


def test_a_users_bug_makes_no_node_an_offender() -> None:
    assert is_offence("gpu_ecc")
    assert is_offence("node_failure")
    mild = (Cause.USER_CODE, Cause.NETWORK, Cause.PREEMPTION, Cause.HANG, Cause.STORAGE)
    assert not any(map(is_offence, mild))
