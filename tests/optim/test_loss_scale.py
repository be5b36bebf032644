"""The loss scale against arithmetic done by hand, over sequences long enough for every rule to meet
every other."""

import json
import random
from dataclasses import replace

import pytest
import torch

from opt_train.config.compose import compose
from opt_train.optim.in_force import in_force
from opt_train.optim.loss_scale import CEILING, LossScale, expected_scale
from opt_train.optim.loss_scale_policy import MEGATRON, METASEQ, LossScalePolicy, policy_of
from opt_train.parallel.config import PrecisionConfig
from opt_train.protocol.exits import BadInput
from tests.optim.syncs import Syncs

CPU = torch.device("cpu")


def after(scale: LossScale, *overflows: bool) -> list[float]:
    """The scale behind each step."""
    scales = []
    for overflow in overflows:
        scale.update(torch.tensor(float(overflow)))
        scales.append(scale.scale.item())
    return scales


def changes(scale: LossScale, steps: int, overflows: set[int]) -> dict[int, float]:
    """The scale by the step (from 1) that moved it."""
    found, previous = {}, scale.scale.item()
    for step, now in enumerate(
        after(scale, *(step in overflows for step in range(1, steps + 1))), start=1
    ):
        if now != previous:
            found[step] = now
        previous = now
    return found


def test_metaseqs_window_grows_with_the_scale() -> None:
    """256 good steps, then 512 counted from the same place, then 1024: as the window doubles at
    each doubling."""
    assert changes(LossScale(METASEQ, CPU), 5000, set()) == {
        256: 8,
        512: 16,
        1024: 32,
        2048: 64,
        4096: 128,
    }


def test_metaseqs_overflow_halves_scale_and_window_and_starts_the_count_again() -> None:
    # Overflow at 300: the window was 512 since step 256, becomes 256. From 301 on, the 256th good
    # step is 556.
    assert changes(LossScale(METASEQ, CPU), 1100, {300}) == {256: 8, 300: 4, 556: 8, 812: 16}


def test_metaseqs_scale_stays_at_its_floor() -> None:
    scale = LossScale(METASEQ, CPU)
    assert after(scale, *[True] * 9) == [2, 1, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125, 0.03125]
    # The window halved with every one: 256 / 2**9 is 0, and a window has a step at least. So it
    # comes back fast.
    assert after(scale, False, False, False, False) == [0.0625, 0.125, 0.125, 0.25]


def test_megatrons_scale_forgives_one_overflow_a_window() -> None:
    scale = LossScale(replace(MEGATRON, window_steps=10), CPU)
    # 3 is forgiven, 5 and 6 are not. From 7 on ten good steps double it at 16, and forgive one
    # again: 20 but not 21.
    assert changes(scale, 40, {3, 5, 6, 20, 21}) == {
        5: 2.0**31,
        6: 2.0**30,
        16: 2.0**31,
        21: 2.0**30,
        31: 2.0**31,
    }


def test_megatrons_window_does_not_adapt() -> None:
    assert changes(LossScale(MEGATRON, CPU), 3500, set()) == {
        1000: 2.0**33,
        2000: 2.0**34,
        3000: 2.0**35,
    }
    assert after(LossScale(MEGATRON, CPU), *[True] * 40)[-1] == 1.0


def by_hand(policy: LossScalePolicy, overflows: list[bool]) -> list[float]:
    """The rules in plain numbers, from the last overflow and the last doubling rather than by
    counters."""
    scale, window, last_overflow, strikes, scales = policy.initial, policy.window_steps, 0, 0, []
    for step, overflow in enumerate(overflows, start=1):
        if overflow:
            last_overflow, strikes = step, strikes + 1
            if strikes >= policy.hysteresis:
                scale = max(scale / 2, policy.floor)
                window = max(window // 2, 1) if policy.window_adapts else window
        elif (step - last_overflow) % window == 0:
            scale, strikes = min(scale * 2, CEILING), 0
            window = window * 2 if policy.window_adapts else window
        scales.append(scale)
    return scales


@pytest.mark.parametrize(
    "policy", [METASEQ, replace(METASEQ, window_steps=5), replace(MEGATRON, window_steps=7)]
)
@pytest.mark.parametrize("often", [0.002, 0.05, 0.4])
def test_thousands_of_steps_equal_the_rules_in_plain_numbers(
    policy: LossScalePolicy, often: float
) -> None:
    draw = random.Random(often)
    overflows = [draw.random() < often for _ in range(3000)]
    assert after(LossScale(policy, CPU), *overflows) == by_hand(policy, overflows)


def test_scale_never_grows_to_an_infinity_it_cannot_leave() -> None:
    scale = LossScale(replace(MEGATRON, window_steps=1), CPU)
    assert after(scale, *[False] * 200)[-1] == CEILING
    assert after(scale, True, True)[-1] == CEILING / 2


def test_fixed_scale_does_not_move() -> None:
    fixed = policy_of(
        PrecisionConfig(compute="fp16", loss_scale="fixed", loss_scale_initial=1024.0)
    )
    assert set(after(LossScale(fixed, CPU), True, False, True)) == {1024.0}
    assert fixed.floor == 1024.0
    assert set(after(LossScale(policy_of(PrecisionConfig(compute="bf16")), CPU), True, False)) == {
        1.0
    }


def test_update_never_waits_for_the_device() -> None:
    scale = LossScale(METASEQ, CPU)
    with Syncs() as syncs:
        scale.update(torch.tensor(1.0))
    assert syncs.seen == []


@pytest.mark.parametrize("policy", [METASEQ, replace(MEGATRON, window_steps=9)])
def test_saved_and_restored_goes_on_as_if_nothing_had_been(policy: LossScalePolicy) -> None:
    draw = random.Random(3)
    overflows = [draw.random() < 0.1 for _ in range(400)]
    whole = LossScale(policy, CPU)
    expected = after(whole, *overflows)
    for cut in (1, 7, 255, 399):
        first, second = LossScale(policy, CPU), LossScale(policy, CPU)
        after(first, *overflows[:cut])
        saved = json.loads(json.dumps(first.to_json()))
        second.restore(saved)
        assert second.scale.item() == expected_scale(policy, saved)
        assert after(second, *overflows[cut:]) == expected[cut:]
        assert second.to_json() == whole.to_json()


def test_changed_policy_is_in_force_and_not_the_checkpoints() -> None:
    """metaseq's restore silently brought back old settings; what a person asks for must be what
    happens."""
    old = LossScale(METASEQ, CPU)
    after(old, True, True)
    changed = replace(METASEQ, initial=64.0)
    scale = LossScale(changed, CPU)
    scale.restore(old.to_json())
    assert scale.scale.item() == expected_scale(changed, old.to_json()) == 64.0


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(KeyError):
        LossScale(METASEQ, CPU).restore({"scale": 2.0})


def test_in_force_knows_a_fixed_scale_and_leaves_a_moving_one_to_the_checkpoint() -> None:
    assert in_force(compose(["precision=bf16"]), (), 3)["loss_scale"] == 1.0
    fixed = compose(
        ["precision=fp16", "precision.loss_scale=fixed", "precision.loss_scale_initial=8"]
    )
    assert in_force(fixed, (), 3)["loss_scale"] == 8.0
    assert "loss_scale" not in in_force(compose(["precision=fp16"]), (), 3)


def test_keys_change_the_policy() -> None:
    assert policy_of(compose(["precision=fp16"]).precision) == METASEQ
    keys = [
        "loss_scale=megatron",
        "loss_scale_initial=65536",
        "loss_scale_window_steps=50",
        "loss_scale_floor=0.25",
    ]
    changed = policy_of(
        compose(["precision=fp16", *(f"precision.{key}" for key in keys)]).precision
    )
    assert changed == replace(MEGATRON, initial=65536.0, window_steps=50, floor=0.25)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "loss_scale_initial=3",
            "precision.loss_scale_initial=3 is no power of two, so scaling would round; use 2 or",
        ),
        (
            "loss_scale_initial=1.2676506002282294e+30",
            "is no scale that moves in fp32; use one between",
        ),
        ("loss_scale_floor=8", "precision.loss_scale_floor=8 is above the first step's scale, 4"),
        ("weights=fp16", "precision.weights=fp16 goes with precision.compute=fp16, not bf16"),
    ],
)
def test_keys_that_cannot_be_are_refused(key: str, message: str) -> None:
    precision = "bf16" if key.startswith("weights") else "fp16"
    with pytest.raises(BadInput, match=message):
        compose([f"precision={precision}", f"precision.{key}"])


def test_a_scale_that_is_ordered_counts_anew_and_keeps_its_floor() -> None:
    scale = LossScale(METASEQ, CPU)
    after(scale, *[True] * 4)
    assert (scale.scale.item(), scale.window_steps) == (0.25, 16)
    values = {"loss_scale": 64.0, "loss_scale_floor": 8.0, "loss_scale_window_steps": 3}
    scale.put_in_force(values)
    scale.put_in_force(values)  # the same step again
    assert (scale.scale.item(), scale.window_steps) == (64.0, 3)
    # 3 good steps double it and the window; five overflows end at the floor.
    floor = {"loss_scale_floor": 8.0}
    scale.put_in_force(floor)
    assert after(scale, False, False, False) == [64, 64, 128]
    assert after(scale, *[True] * 5) == [64, 32, 16, 8, 8]
    again = LossScale(METASEQ, CPU)
    again.restore(json.loads(json.dumps(scale.to_json())))
    again.put_in_force(floor)
    assert after(again, True, False) == after(scale, True, False)
    # A floor that is raised lifts the scale to it.
    scale.put_in_force({"loss_scale_floor": 1024.0})
    assert scale.scale.item() == 1024.0


def test_putting_a_scale_in_force_waits_for_nothing() -> None:
    scale = LossScale(METASEQ, CPU)
    with Syncs() as syncs:
        scale.put_in_force({"loss_scale": 64.0, "loss_scale_floor": 8.0})
    assert syncs.seen == []


def test_a_fixed_scale_is_what_is_in_force() -> None:
    policy = policy_of(PrecisionConfig(compute="fp16", loss_scale="fixed", loss_scale_initial=8.0))
    scale = LossScale(policy, CPU)
    scale.put_in_force({"loss_scale": 256.0, "loss_scale_floor": 256.0})
    assert after(scale, True, False) == [256, 256]
    again = LossScale(policy, CPU)
    again.restore(scale.to_json())
    again.put_in_force({"loss_scale": 8.0, "loss_scale_floor": 8.0})
    assert again.scale.item() == 8.0, "before the order it was another"
