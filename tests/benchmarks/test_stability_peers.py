"""The published guards of the benchmark of sick runs decide as their rules have it, and sicknesses
change what they are to."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.stability.families import FAMILIES, QUICK
from benchmarks.stability.outcomes import OUTCOMES
from benchmarks.stability.peers import SkipStep, ZClip
from benchmarks.stability.settings import (
    BASES,
    CONTROLS,
    HALVES,
    HEALTHY,
    HELD_OUT,
    OURS,
    TUNING,
    healthy_runs,
    sick_run,
    twin_of,
)
from benchmarks.stability.sicknesses import INJECTIONS, ONE_DOCUMENT, POISONS
from opt_train.data.batches import MicroBatch

ROOT = Path(__file__).resolve().parents[2]


def test_skip_step_is_six_deviations_of_the_last_128_observed() -> None:
    """Against numpy over the whole history, whose window is cut out anew each time."""
    random = np.random.default_rng(0)
    losses = random.normal(3.0, 0.1, 400)
    norms = random.normal(1.0, 0.2, 400)
    losses[200:203] = 9.0
    norms[300] = 40.0
    rule = SkipStep()
    for n, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        expected = False
        if n + 1 >= 64:
            for value, seen in ((loss, losses[max(0, n - 128) : n]), (norm, norms[:n][-128:])):
                expected |= value > seen.mean() + 6 * seen.std(ddof=1)
        assert rule.skips(float(loss), float(norm)) == expected, n
        if n in (200, 300):
            assert expected


def test_skip_step_skips_what_is_not_finite_and_is_not_blinded_by_it() -> None:
    rule = SkipStep()
    for n in range(100):
        assert not rule.skips(3.0 + n % 2 * 0.1, 1.0 + n % 3 * 0.1)
    assert rule.skips(math.nan, math.nan)
    assert not rule.skips(3.05, 1.1)
    assert rule.skips(9.0, 1.1)


def test_zclip_clips_to_what_its_rule_says() -> None:
    """By hand: 25 norms of mean 1 and variance 0.04, then one of 2."""
    rule = ZClip()
    first = [1.2, 0.8] * 12 + [1.0]
    for norm in first:
        assert math.isinf(rule.limit(norm))
    deviation = math.sqrt(np.var(first))
    z = (2.0 - 1.0) / (deviation + 1e-6)
    assert z > 2.5
    limit = 1.0 + 2.5 * deviation / (z / 2.5)
    assert rule.limit(2.0) == limit
    # It counts as what it was clipped to.
    mean = 0.97 * 1.0 + 0.03 * limit
    variance = 0.97 * deviation**2 + 0.03 * (limit - mean) ** 2
    z = (2.0 - mean) / (math.sqrt(variance) + 1e-6)
    assert rule.limit(2.0) == mean + 2.5 * math.sqrt(variance) / (z / 2.5)
    assert math.isinf(rule.limit(math.nan))
    assert math.isinf(rule.limit(1.0))


def test_the_halves_share_no_family_seed_or_rate() -> None:
    names = [{family.name for family in FAMILIES[half]} for half in HALVES]
    assert not names[0] & names[1]
    assert set(QUICK) <= {family.name for family in FAMILIES[TUNING]}
    seeds = [{base.seed for base in BASES[half]} for half in HALVES]
    assert not seeds[0] & seeds[1]
    assert not set(HEALTHY[TUNING][0]) & set(HEALTHY[HELD_OUT][0])
    healthy = [{run.base.seed for run in healthy_runs(half, 50, 100)} for half in HALVES]
    assert not set.intersection(*healthy)
    assert sum(len(FAMILIES[half]) for half in HALVES) >= 30
    assert len({family.kind for half in HALVES for family in FAMILIES[half]}) >= 12


def test_a_twin_differs_by_the_sickness_alone() -> None:
    for half in HALVES:
        for family in FAMILIES[half]:
            assert family.sickness or family.wrong
            assert bool(family.sickness) != bool(family.wrong)
            twin = twin_of(family, BASES[half][0], 100)
            sick = sick_run(family, BASES[half][0], 100, twin.control)
            assert {*sick.overrides()} - {*twin.overrides()} == {*family.wrong}
            assert "sickness" not in twin.sick()
            if family.sickness:
                assert family.sickness["what"] in INJECTIONS


def test_a_changed_setting_is_another_run() -> None:
    [family, *_] = FAMILIES[TUNING]
    base = BASES[TUNING][0]
    names = {sick_run(family, base, 100, control).name for control in CONTROLS}
    assert len(names) == len(CONTROLS)
    assert sick_run(family, base, 101, OURS).name not in names
    assert sick_run(family, base, 100, OURS).name in names


def test_broken_batches_keep_their_shape_and_are_broken() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(4, 320, (4, 9), generator=generator)
    batch = MicroBatch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous(), torch.ones(4))
    for name, poison in POISONS.items():
        again = [poison(batch, torch.Generator().manual_seed(5), 320) for _ in range(2)]
        tokens, targets = again[0]
        assert all(torch.equal(*both) for both in zip(*again, strict=True)), name
        assert tokens.shape == targets.shape == batch.tokens.shape
        assert 0 <= tokens.min() <= tokens.max() < 320
        changed = not torch.equal(tokens, batch.tokens)
        assert changed != name.startswith("labels"), name
        assert not torch.equal(targets, batch.targets), name
        if changed:
            assert torch.equal(tokens[:, 1:], targets[:, :-1]), f"{name} is text like any other"
    assert ONE_DOCUMENT not in POISONS


def test_an_unknown_family_is_a_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stability", "--families", "nonsense"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nonsense: not of the half" in done.stderr
    assert OUTCOMES
