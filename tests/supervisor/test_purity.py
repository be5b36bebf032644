"""The policy is pure, in whatever situation simulated runs come to."""

import pickle
from typing import Any

import pytest

from opt_train.simulation.histories import run_history
from opt_train.supervisor import core
from opt_train.supervisor.rules.table import decide


def test_to_decide_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked twice in the same situation, the policy answers the same, whatever the situation."""
    asked = answered = 0

    def decide_twice(state: Any, view: Any, config: Any, identity: Any) -> Any:
        nonlocal asked, answered
        for node in (*identity.nodes, *state.nodes):
            view.node(node)  # made when first looked at, and empty
        before = pickle.dumps((state, vars(view)))
        first = decide(state, view, config, identity)
        second = decide(state, view, config, identity)
        assert first == second
        assert pickle.dumps((state, vars(view))) == before, f"changed by deciding on {first}"
        asked, answered = asked + 1, answered + bool(first)
        return second

    monkeypatch.setattr(core, "decide", decide_twice)
    for seed in range(12):
        run_history(seed)
    assert asked > answered > 300
