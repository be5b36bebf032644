"""The LR by step, at every corner of its line."""

import json
from dataclasses import replace

import pytest
import torch

from opt_train.config.run_config import RunConfig
from opt_train.optim.config import OptimConfig
from opt_train.optim.in_force import differences, in_force
from opt_train.optim.schedule import learning_rate
from opt_train.protocol.orders import LedgerEntry, Order, SaveAndStop, make_order, parameters_of
from opt_train.run import ledger as ledgers
from opt_train.train.config import TrainConfig
from tests.train.lr_factor import LrFactor

OPTIM = OptimConfig(lr=1.0, warmup_steps=10, decay_steps=109, final_fraction=0.1)


def test_warm_up_starts_above_zero_and_reaches_the_peak_once() -> None:
    rates = [learning_rate(OPTIM, step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates.count(1.0) == 1
    assert max(rates) == 1.0


def test_decay_is_linear_to_the_floor_and_stays() -> None:
    assert learning_rate(OPTIM, 59, 200) == pytest.approx(
        0.55
    )  # half way between batches 9 and 109
    falls = [learning_rate(OPTIM, s, 200) - learning_rate(OPTIM, s + 1, 200) for s in range(9, 108)]
    assert min(falls) == pytest.approx(max(falls))
    assert learning_rate(OPTIM, 109, 200) == pytest.approx(0.1)
    assert learning_rate(OPTIM, 5000, 200) == pytest.approx(0.1)


def test_cosine_is_that_of_torch() -> None:
    optim = replace(OPTIM, schedule="cosine")
    weight = torch.nn.Parameter(torch.zeros(1))
    by_torch = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([weight], lr=1.0), T_max=100, eta_min=0.1
    )
    for step in range(9, 110):
        [expected] = by_torch.get_last_lr()
        assert learning_rate(optim, step, 200) == pytest.approx(expected, rel=1e-9)
        weight.grad = torch.zeros(1)
        by_torch.optimizer.step()
        by_torch.step()
    assert learning_rate(optim, 150, 200) == pytest.approx(0.1)


def test_wsd_stays_at_the_peak_and_decays_at_the_end() -> None:
    optim = replace(OPTIM, schedule="wsd", cooldown_steps=20)
    rates = [learning_rate(optim, step, 200) for step in range(200)]
    assert rates[9:90] == [1.0] * 81
    assert rates[99] == pytest.approx(0.55), "half way between batches 89 and 109"
    assert rates[109:] == [pytest.approx(0.1)] * 91


def test_a_cooldown_branched_off_has_the_rates_of_the_stable_part_before_it() -> None:
    """The same checkpoint may be cooled down at any length: up to there all have trained alike."""
    long = replace(OPTIM, schedule="wsd", decay_steps=1000, cooldown_steps=100)
    branch = replace(long, decay_steps=600)
    assert all(learning_rate(long, s, 1000) == learning_rate(branch, s, 1000) for s in range(500))
    assert learning_rate(branch, 600, 1000) == pytest.approx(0.1)


def test_constant_stays() -> None:
    optim = replace(OPTIM, schedule="constant")
    rates = [learning_rate(optim, step, 200) for step in range(300)]
    assert rates[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert rates[9:] == [1.0] * 291


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 20])
def test_short_runs_divide_by_nothing(warmup: int, schedule: str) -> None:
    """A run no longer than its warm-up must not divide by zero or rise above the peak."""
    optim = OptimConfig(
        lr=1.0, warmup_steps=warmup, decay_steps=0, schedule=schedule, cooldown_steps=5
    )
    rates = [learning_rate(optim, step, 10) for step in range(12)]
    assert all(0.0 < rate <= 1.0 for rate in rates)


def test_in_force_is_what_the_configuration_says() -> None:
    config = RunConfig(optim=OPTIM, train=TrainConfig(steps=200, global_batch=8))
    assert in_force(config, [], 3) == {
        "lr": pytest.approx(0.4),
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip": 1.0,
        "loss_scale": 1.0,
        "embedding_gradient": 1.0,
        "samples": 24,
    }


def test_orders_of_the_ledger_hold_from_their_step_on() -> None:
    config = RunConfig(optim=OPTIM, train=TrainConfig(steps=200, global_batch=8))
    ledger = (LedgerEntry(3, LrFactor(1, "", 0.5)), LedgerEntry(5, LrFactor(2, "", 0.5)))
    scheduled = [in_force(config, (), step)["lr"] for step in range(8)]
    factors = [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert [in_force(config, ledger, step)["lr"] for step in range(8)] == [
        rate * factor for rate, factor in zip(scheduled, factors, strict=True)
    ]
    others = in_force(config, ledger, 7)
    assert {**others, "lr": None} == {**in_force(config, (), 7), "lr": None}


def test_no_order_raises_the_rate_above_its_schedule() -> None:
    doubled = (LedgerEntry(0, LrFactor(1, "", 2.0)),)
    assert in_force(RunConfig(), doubled, 3) == in_force(RunConfig(), (), 3)


def test_order_of_a_newer_version_is_not_silently_ignored() -> None:
    """Training under values that nobody here can name would be a guess."""
    unknown = make_order("of_the_future", 4, "because", {"factor": 0.5})
    with pytest.raises(ValueError, match="order 4 \\(of_the_future\\) in the ledger is not known"):
        in_force(RunConfig(), (LedgerEntry(2, unknown),), 3)
    assert in_force(RunConfig(), (LedgerEntry(4, unknown),), 3) == in_force(RunConfig(), (), 3)


@pytest.mark.parametrize("order", [SaveAndStop(3, "a person"), LrFactor(4, "spike", 0.5)])
def test_order_is_its_own_payload_in_journal_and_checkpoint(order: Order) -> None:
    again = make_order(order.kind, order.number, order.reason, parameters_of(order))
    assert again == order
    written = json.loads(json.dumps(ledgers.to_json((LedgerEntry(7, order),))))
    assert ledgers.from_json(written) == (LedgerEntry(7, order),)


def test_ledger_takes_lasting_orders_alone_and_each_once() -> None:
    half = LrFactor(2, "spike", 0.5)
    assert ledgers.with_order((), SaveAndStop(1, "a person"), 5) == ()
    ledger = ledgers.with_order((), half, 5)
    assert ledger == (LedgerEntry(5, half),)
    assert ledgers.with_order(ledger, half, 9) == ledger


def test_each_difference_is_named() -> None:
    expected = in_force(RunConfig(), [], 3)
    assert differences(expected, {**expected, "updates": 3}) == []
    # What spoiled OPT-175B's runs 12.35 to 12.37: the checkpoint's old betas, silently back in
    # force.
    assert differences(expected, {**expected, "beta1": 0.0}) == [
        "beta1: expected 0.9, in force 0.0"
    ]
    missing = {k: v for k, v in expected.items() if k != "clip"}
    assert differences(expected, missing) == ["clip: expected 1.0, in force None"]
    assert differences(expected, {**expected, "lr": "NaN"}) != []
