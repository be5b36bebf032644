"""A simulation that notices nothing proves nothing: rules are broken on purpose, and some seed must
see it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from opt_train.protocol.facts import PreflightEnded
from opt_train.run.checkpoint import Checkpoint
from opt_train.run.state import RunState, Stage
from opt_train.simulation.verdict import judge
from opt_train.supervisor import core
from opt_train.supervisor.effects import Append
from opt_train.supervisor.rules import (
    acknowledgements,
    attempts,
    checkpoints,
    failures,
    hangs,
    lemons,
    nodes,
    orders,
    returns,
    table,
)
from opt_train.supervisor.rules.context import Context, Decision

MOST_SEEDS = 150
LATE = {"no_budget": 100, "all_retired": 30, "no_fence": 20, "a_held_run_begins": 450}
"""Where to begin, for what is noticed late."""
Break = Callable[[pytest.MonkeyPatch], None]


def without(rule: Callable[[Context], list[Decision]]) -> Break:
    """The policy without one of its rules, in every stage."""

    def break_it(patch: pytest.MonkeyPatch) -> None:
        def kept(rules: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(known for known in rules if known is not rule)

        patch.setattr(table, "STAGES", {stage: kept(r) for stage, r in table.STAGES.items()})
        for name in ("RECEIVE", "TAKE_OVER", "STOP_BY_FORCE", "AT_REST", "LAST"):
            patch.setattr(table, name, kept(getattr(table, name)))

    return break_it


def no_fence(patch: pytest.MonkeyPatch) -> None:
    """Who is out of reach is taken to be gone."""
    patch.setattr(Context, "is_gone", lambda self, node, generation: True)


def failed_nodes_return(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "has_failed", lambda self, node: False)


def returned_untested(patch: pytest.MonkeyPatch) -> None:
    """Whoever dials in again is taken back."""
    patch.setattr(returns, "_has_passed", lambda s, node: PreflightEnded(5, 0, 1.0))


def rejected_anyway(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint that did not verify is taken again."""

    def newest(self: RunState, *, shared_only: bool = False) -> Any:
        return self.chain()[-1] if self.chain() else None

    patch.setattr(RunState, "newest_good", newest)


def acknowledged_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(acknowledgements, "is_settled", lambda s, fact: True)


def all_retired(patch: pytest.MonkeyPatch) -> None:
    """Retention keeps nothing."""
    patch.setattr(checkpoints, "dispensable", lambda state, config: state.chain())


def acts_before_it_is_durable(patch: pytest.MonkeyPatch) -> None:
    """Effects leave before the line that announces them."""
    settle = core.Supervisor._settle

    def hasty(self: core.Supervisor) -> Any:
        effects = settle(self)
        lines = [e for e in effects if isinstance(e, Append)]
        return [*(e for e in effects if not isinstance(e, Append)), *lines]

    patch.setattr(core.Supervisor, "_settle", hasty)


def no_budget(patch: pytest.MonkeyPatch) -> None:
    """A cause may strike for ever."""
    patch.setattr(failures, "respond", _always_restart)


def _always_restart(*_: Any, **__: Any) -> Any:
    return failures.Remedy(failures.Action.RESTART, "again")


def a_held_run_begins(patch: pytest.MonkeyPatch) -> None:
    """A hold is none to whoever looks whether the next attempt may begin."""

    def rest(s: Context) -> list[Decision]:
        return orders.rest(replace(s, state=replace(s.state, hold=None)))

    gather = tuple(rest if rule is orders.rest else rule for rule in table.GATHER)
    changed = {Stage.ASSEMBLING: gather, Stage.RECOVERING: gather}
    patch.setattr(table, "STAGES", {**table.STAGES, **changed})


def the_newest_after_a_rollback(patch: pytest.MonkeyPatch) -> None:
    """Ranks that die before they obey a rollback begin again where they were."""

    def newest_good(state: RunState, **shared: bool) -> Checkpoint | None:
        return original(replace(state, orders=()), **shared)

    original = RunState.newest_good
    patch.setattr(RunState, "newest_good", newest_good)


MUTANTS: dict[str, Break] = {
    "the_newest_after_a_rollback": the_newest_after_a_rollback,
    "no_fence": no_fence,
    "failed_nodes_return": failed_nodes_return,
    "returned_untested": returned_untested,
    "offences_are_not_shared": without(lemons.share),
    "rejected_anyway": rejected_anyway,
    "acknowledged_at_once": acknowledged_at_once,
    "all_retired": all_retired,
    "acts_before_it_is_durable": acts_before_it_is_durable,
    "no_budget": no_budget,
    "a_held_run_begins": a_held_run_begins,
    "no_verification": without(attempts.verify),
    "no_kill": without(failures.kill),
    "nobody_watches_hangs": without(hangs.watch_hang),
    "nobody_watches_missing_ranks": without(hangs.watch_missing),
    "nobody_is_adopted": without(attempts.adopt),
    "a_late_commit_is_ignored": without(checkpoints.conclude),
    "orders_are_not_relayed": without(orders.relay),
    "no_buffer_node_is_promoted": without(nodes.promote_buffers),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_some_seed_notices(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    first = LATE.get(mutant, 0)
    for seed in range(first, first + MOST_SEEDS):
        verdict = judge(seed)
        if verdict.broken:
            return
    pytest.fail(f"{MOST_SEEDS} seeds notice nothing")
