"""Thousands of simulated runs through the very code that runs in production; a seed that breaks an
invariant is named with the command that runs it again."""

import re
from collections import Counter

import pytest

from opt_train.run.state import TERMINAL
from opt_train.simulation.__main__ import main
from opt_train.simulation.histories import run_history
from opt_train.simulation.verdict import command_for, judge

SEEDS = 2000
PARTS = 20


@pytest.mark.parametrize("part", range(PARTS))
def test_no_seed_breaks_an_invariant(part: int) -> None:
    """Two generations at once, a hang, a restart loop, a lost word, a failed node handed back, an
    orphan, a checkpoint of another branch: the world asserts against each at every step."""
    verdicts = [judge(seed) for seed in range(part * SEEDS // PARTS, (part + 1) * SEEDS // PARTS)]
    broken = [f"{v.broken}\n  again: {command_for(v.seed)}" for v in verdicts if v.broken]
    assert not broken, "\n".join(broken)
    # The disasters are neither harmless nor always the end: otherwise this would test nothing.
    ends = Counter(verdict.end for verdict in verdicts)
    assert set(ends) >= TERMINAL
    assert ends["finished"] > len(verdicts) // 5


def test_a_seed_is_the_same_whenever_it_is_run() -> None:
    """A seed that fails must fail again."""
    first, second = run_history(77), run_history(77)
    assert first.journal == second.journal
    assert first.effects == second.effects


def test_the_command_names_how_the_runs_ended(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--first", "3", "--seeds", "2", "--jobs", "1"]) == 0
    assert re.search(r"2 seeds: \d \w+.*; 0 broke an invariant", capsys.readouterr().out)
    assert main(["--first", "3", "--seeds", "1"]) == 0
    assert "RunCreated" in capsys.readouterr().out, "the journal of a single seed is printed"
