"""Thousands of random histories through the very code that runs in production; a failing seed is named and replays."""

import pytest

from tests.supervisor_core.histories import run_history

HISTORIES = 3000
PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
def test_no_history_hangs_loops_or_forgets(part: int) -> None:
    """Two generations alive at once, a restart loop, a lost word, a failed node handed back, a state that a replay
    does not reach: the world asserts against each of them at every step."""
    ends: dict[str, int] = {}
    for seed in range(part * HISTORIES // PARTS, (part + 1) * HISTORIES // PARTS):
        try:
            world = run_history(seed)
        except AssertionError as error:
            pytest.fail(f"history {seed}: {error} (replay: tests.supervisor_core.histories.run_history({seed}))")
        ends[world.replayed.stage] = ends.get(world.replayed.stage, 0) + 1
    # The disasters are neither harmless nor always the end: otherwise this would test nothing.
    assert set(ends) == {"finished", "stopped", "halted"}
    assert ends["finished"] > HISTORIES // PARTS // 4


def test_a_history_is_the_same_whenever_it_is_run() -> None:
    """A seed that fails must fail again."""
    first, second = run_history(77), run_history(77)
    assert first.journal == second.journal
    assert first.effects == second.effects
