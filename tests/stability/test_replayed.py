"""What the numbers of steps that are trained again say, and what this rank keeps of the first
time."""

import math
from collections.abc import Iterable

import pytest

from opt_train.stability.replayed import DETERMINISTIC, Replayed, ReplayResult, ReplayVerdict
from opt_train.train.replays import REMEMBERED, Replays

SAME, NEW = 0, None


def result_of(
    differs: Iterable[int | None], rank: int | None = None, first: int = 21
) -> ReplayResult | None:
    replayed = Replayed(20)
    for step, ranks in enumerate(differs, start=first):
        line = {"step": step, "replay_differs": ranks, "replay_rank": rank if ranks else None}
        replayed.append(line)
    return replayed.result


def test_steps_that_are_the_same_to_the_end_are_reproduced() -> None:
    assert result_of([SAME] * 30) is None, "there may be more"
    assert result_of([SAME] * 30 + [NEW] * 5) == ReplayResult(ReplayVerdict.REPRODUCED, 30)
    assert result_of([NEW] * 30 + [SAME]) is None, "nothing was trained again"


def test_a_step_that_is_not_is_a_one_time_result_once_others_were() -> None:
    same = [SAME] * DETERMINISTIC
    assert result_of([*same, 1, 2, 2, NEW], rank=1) == ReplayResult(
        ReplayVerdict.ONE_TIME, DETERMINISTIC, 21 + DETERMINISTIC, 1, 1
    )
    assert result_of([*same, 8, 8]) == ReplayResult(
        ReplayVerdict.ONE_TIME, DETERMINISTIC, 21 + DETERMINISTIC, 8
    )
    early = result_of([*same[1:], 8, 8])
    assert early is not None
    assert early.verdict is ReplayVerdict.NOT_DETERMINISTIC
    assert result_of([*same, 1], first=22) is None, "the first line did not come"


VALUES = {"lr": 1e-3, "clip": 1.0}


def trained(steps: range, replays: Replays, **changes: float) -> list[bool | None]:
    return [replays.compare(step, 8 * step, VALUES | changes, (float(step),)) for step in steps]


def test_a_rank_compares_what_it_trains_again_under_the_same_values() -> None:
    replays = Replays()
    assert trained(range(20), replays) == [None] * 20
    replays.begin_attempt()
    assert trained(range(10, 25), replays) == [True] * 10 + [None] * 5
    replays.begin_attempt()
    again = trained(range(10, 14), replays)
    assert again == [True] * 4
    # By bits: -0.0 is equal to 0.0, and is another number.
    assert replays.compare(14, 8 * 14, VALUES, (-14.0,)) is False
    assert trained(range(15, 20), replays) == [None] * 5, "all behind it may differ"
    replays.begin_attempt()
    assert trained(range(14, 16), replays, lr=5e-4) == [None] * 2
    replays.begin_attempt()
    assert replays.compare(12, 8 * 12 + 64, VALUES, (12.0,)) is None, "another batch"


@pytest.mark.parametrize(("first", "second"), [(math.nan, math.nan), (math.inf, math.inf)])
def test_what_is_not_finite_may_come_again(first: float, second: float) -> None:
    replays = Replays()
    replays.compare(1, 8, VALUES, (first,))
    replays.begin_attempt()
    assert replays.compare(1, 8, VALUES, (second,)) is True


def test_only_so_many_steps_are_kept() -> None:
    replays = Replays()
    trained(range(3 * REMEMBERED), replays)
    assert len(replays._steps) == REMEMBERED
    replays.begin_attempt()
    assert trained(range(REMEMBERED), replays) == [None] * REMEMBERED
