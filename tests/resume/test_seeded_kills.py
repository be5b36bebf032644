"""A kill that comes in the wrong moment must not change a bit. `make test-resume` is the same with
fifty kills."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.resume import kills
from tests.resume.kills import PRECISIONS, Starter, bits, kill_and_compare
from tests.resume.struck_rank import draw

SEEDS = {"fp32": 8, "bf16": 233, "fp16": 7, "fp16-memory-efficient": 9}
"""One rank and both within the second save, and right after a commit: each time there is something
to restore."""


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    with Starter() as process:
        yield process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all precisions have their runs, over the same prepared data."""
    return tmp_path_factory.mktemp("kills")


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(precision, marks=[] if precision == "fp32" else pytest.mark.slow)
        for precision in PRECISIONS
    ],
)
def test_a_killed_run_comes_to_the_same_bits(
    precision: str, starter: Starter, folder: Path
) -> None:
    [kill] = kill_and_compare(
        starter, folder / precision, precision, seed=SEEDS[precision], kills=1
    )
    assert kill.resumed_step > 0
    assert kill.steps_lost <= 3 * kills.EVERY_STEPS


def test_a_loss_that_differs_in_its_last_bit_is_seen() -> None:
    assert bits(5.791797160000001) != bits(5.79179716)
    assert bits("NaN") == bits("NaN")


def test_seeds_hit_every_moment_and_every_victim() -> None:
    strikes = [draw(f"1/{number}") for number in range(200)]
    assert {strike.moment for strike in strikes} == {
        "start",
        "restore",
        "restored",
        "data",
        "step",
        "waiting",
        "save",
        "saved",
        "committed",
    }
    assert {(strike.takes_all, strike.rank) for strike in strikes} == {
        (a, r) for a in (True, False) for r in (0, 1)
    }
