"""Thousands of random histories through the very code that runs in production; a failing seed is
named and replays."""

import pickle
from typing import Any

import pytest

from opt_train.supervisor import core
from opt_train.supervisor.rules.table import decide
from tests.supervisor.histories import run_history

HISTORIES = 1800
PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
def test_no_history_hangs_loops_or_forgets(part: int) -> None:
    """Two generations alive at once, a restart loop, a lost word, a failed node handed back, a
    state that a replay does not reach: the world asserts against each of them at every step."""
    ends: dict[str, int] = {}
    succeeded = 0
    for seed in range(part * HISTORIES // PARTS, (part + 1) * HISTORIES // PARTS):
        try:
            world = run_history(seed)
        except AssertionError as error:
            pytest.fail(
                f"history {seed}: {error} (replay: tests.supervisor.histories.run_history({seed}))"
            )
        succeeded += world.leaders > 1
        ends[world.replayed.stage] = ends.get(world.replayed.stage, 0) + 1
    # The disasters are neither harmless nor always the end: otherwise this would test nothing.
    assert set(ends) == {"finished", "stopped", "halted"}
    assert ends["finished"] > HISTORIES // PARTS // 4
    assert succeeded > HISTORIES // PARTS // 3, (
        "a supervisor died and another went on from its journal"
    )


def test_a_history_is_the_same_whenever_it_is_run() -> None:
    """A seed that fails must fail again."""
    first, second = run_history(77), run_history(77)
    assert first.journal == second.journal
    assert first.effects == second.effects


def test_to_decide_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked twice in the same situation, the policy answers the same, whatever the situation."""
    asked = answered = 0

    def decide_twice(state: Any, view: Any, config: Any, identity: Any) -> Any:
        nonlocal asked, answered
        for node in identity.nodes:
            view.node(node)  # made when first looked at, and empty
        before = pickle.dumps((state, vars(view)))
        first = decide(state, view, config, identity)
        second = decide(state, view, config, identity)
        assert first == second
        assert pickle.dumps((state, vars(view))) == before, f"changed by deciding on {first}"
        asked, answered = asked + 1, answered + bool(first)
        return second

    monkeypatch.setattr(core, "decide", decide_twice)
    for seed in range(40):
        run_history(seed)
    assert asked > answered > 1000
