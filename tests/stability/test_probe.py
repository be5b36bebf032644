"""Where a state looks at the data, and what its losses say."""

import math
import random

import numpy as np
import pytest

from opt_train.run.instability import ProbeVerdict
from opt_train.stability.probe import Usual, diagnose, places, usual_of

BATCH = 8
STANDS, ALARM = 190 * BATCH, 206 * BATCH
USUAL = Usual(4.0, 0.3)
PLACES = places(STANDS, ALARM, BATCH, control_at=186 * BATCH)


def found(
    bad: range, loss: float = 5.0, usual: Usual | None = USUAL
) -> tuple[ProbeVerdict, int, int]:
    """What is said where the batches of `bad` have `loss`, and all others 4.0."""
    losses = []
    for place in PLACES:
        four = range(place // BATCH, place // BATCH + 4)
        losses.append((place, sum(loss if b in bad else 4.0 for b in four) / 4))
    finding = diagnose(losses, usual, STANDS, ALARM, BATCH)
    return finding.verdict, finding.bad_from // BATCH, finding.bad_to // BATCH


def test_places_lie_close_before_the_alarm_and_ever_further_behind_it() -> None:
    assert [place // BATCH for place in PLACES] == [
        186,
        *(190, 194, 198, 202),
        *(206, 210, 218, 234, 266, 330, 458, 714, 1226),
    ]
    # Further back they lie ever further apart, down to where the state stands.
    far = places(0, 206 * BATCH, BATCH, control_at=None)
    assert [place // BATCH for place in far][:9] == [0, 70, 134, 166, 182, 190, 194, 198, 202]
    assert places(STANDS, STANDS, BATCH, None)[0] == STANDS


@pytest.mark.parametrize(
    "bad", [range(190, 230), range(200, 226), range(205, 207), range(203, 600)]
)
def test_a_bad_range_is_named_whole_and_its_end_not_far_behind_it(bad: range) -> None:
    for loss in (9.0, 0.5, math.nan):
        verdict, begin, end = found(bad, loss)
        assert verdict is ProbeVerdict.BAD_DATA
        assert max(190, bad.start - 8) <= begin <= bad.start
        assert bad.stop <= end <= max(210, bad.start + 2 * len(bad) + 4)


def test_what_is_bad_elsewhere_is_no_cause() -> None:
    """Neither far behind the alarm nor anywhere at all."""
    assert found(range(0)) == (ProbeVerdict.NORMAL, 0, 0)
    assert found(range(1226, 1230)) == (ProbeVerdict.NORMAL, 0, 0)


def test_a_state_that_finds_what_it_has_learnt_unusual_is_sick_itself() -> None:
    assert found(range(2000)) == (ProbeVerdict.BAD_STATE, 0, 0)
    assert found(range(180, 230)) == (ProbeVerdict.BAD_STATE, 0, 0)


def test_without_an_end_all_that_was_looked_at_is_bad() -> None:
    assert found(range(200, 9000)) == (ProbeVerdict.BAD_DATA, 194, 1230)


def test_where_nothing_is_known_only_what_is_not_finite_is_bad() -> None:
    assert found(range(200, 226), 50.0, usual=None)[0] is ProbeVerdict.UNKNOWN
    assert found(range(200, 226), math.nan, usual=None) == (ProbeVerdict.BAD_DATA, 194, 234)
    assert found(range(9000), math.inf, usual=None)[0] is ProbeVerdict.BAD_STATE


@pytest.mark.parametrize("seed", range(10))
def test_usual_is_the_level_that_a_falling_loss_has_come_to(seed: int) -> None:
    """As a least squares line through the same losses has it, which one outlier would move."""
    draw = random.Random(seed)
    losses = [5.0 - 0.01 * step + draw.gauss(0, 0.05) for step in range(200)]
    usual = usual_of(losses)
    assert usual is not None
    slope, offset = np.polyfit(np.arange(64.0), losses[-64:], 1)
    assert usual.level == pytest.approx(slope * 63 + offset, abs=0.05)
    assert usual.tolerance == pytest.approx(0.05 * usual.level, rel=1e-9)
    losses[-10] = 40.0
    outlier = usual_of([*losses[:-1], math.nan])
    assert outlier is not None
    assert outlier.level == pytest.approx(usual.level, abs=0.1)
    noisy = usual_of([4.0 + draw.gauss(0, 0.5) for _ in range(64)])
    assert noisy is not None
    assert noisy.tolerance == pytest.approx(1.0, rel=0.5), "two deviations"
    assert usual_of(losses[:31]) is None


def test_of_healthy_runs_no_place_is_called_bad() -> None:
    """Losses that fall as those of a tiny run do, with noise of 5 and of 1 percent a batch."""
    draw, wrong, judged = random.Random(1), 0, 0
    for _ in range(300):
        step, noise = draw.randrange(40, 2000), draw.choice((0.05, 0.01))

        def loss(at: int, noise: float = noise) -> float:
            return 8.0 * (at + 5) ** -0.2 * (1 + draw.gauss(0, noise))

        usual = usual_of([loss(at) for at in range(max(0, step - 64), step)])
        assert usual is not None
        means = [sum(loss(step) for _ in range(4)) / 4 for _ in PLACES]
        wrong += sum(not usual.has(mean) for mean in means)
        judged += len(means)
    assert wrong / judged < 0.002, (wrong, judged)
