"""The queue of orders with parameters: relayed, obeyed at one step, in the ledger, never lost."""

from opt_logbook.record.events import (
    AttemptStarted,
    FailureSeen,
    OrderEnded,
    OrderGiven,
    RunFinished,
)

from opt_train.protocol.orders import LedgerEntry
from tests.supervisor.started import a_run
from tests.train.lr_factor import LrFactor

HALF, QUARTER = LrFactor(1, "a spike", 0.5), LrFactor(2, "another", 0.25)


def test_order_with_parameters_is_relayed_obeyed_and_in_the_ledger() -> None:
    world = a_run().until_step(5)
    world.give(HALF)
    world.until(OrderEnded)
    assert world.events(OrderGiven) == [OrderGiven(1, "test_lr_factor", "a spike", {"factor": 0.5})]
    [ended] = world.entries(OrderEnded)
    assert ended.event == OrderEnded(1, "obeyed")
    assert world.replayed.ledger == (LedgerEntry(ended.step, HALF),)
    assert world.replayed.orders == ()
    world.run()
    assert world.events(RunFinished)


def test_two_orders_do_not_wait_for_one_another() -> None:
    """A second order once waited for five seconds, because it passed for the first sent again."""
    world = a_run().until_step(5)
    given = world.now
    world.give(HALF, QUARTER)
    world.until(OrderEnded, count=2)
    assert [entry.event.number for entry in world.entries(OrderEnded)] == [1, 2]
    assert world.now - given < 5.0
    assert [entry.order for entry in world.replayed.ledger] == [HALF, QUARTER]


def test_next_generation_begins_with_the_ledger() -> None:
    world = a_run().until_step(5)
    world.give(HALF)
    world.until(OrderEnded)
    ledger = world.replayed.ledger
    world.until_step(world.replayed.ledger[0].step + 2)
    world.kill_rank(0)
    world.until(AttemptStarted, count=2).until_step(ledger[0].step + 3)
    # The virtual ranks report what the ledger of their `Begin` makes of the configuration, and the
    # supervisor compares: a difference would be a failure.
    assert {rank.begin.ledger for rank in world.ranks()} == {ledger}
    assert {rank.begin.order_number for rank in world.ranks()} == {1}
    assert len(world.events(FailureSeen)) == 1
    world.run()
    assert world.replayed.ledger == ledger


def test_order_that_died_with_its_ranks_is_relayed_to_the_next() -> None:
    world = a_run().until_step(5)
    world.kill_rank(0)
    world.give(HALF)
    world.run()
    assert world.entries(AttemptStarted)[-1].seq < world.entries(OrderEnded)[0].seq
    assert world.events(OrderEnded) == [OrderEnded(1, "obeyed")]
    assert world.events(RunFinished)


def test_new_supervisor_stands_where_the_old_one_did() -> None:
    world = a_run().until_step(5)
    world.give(HALF)
    world.kill_supervisor()
    world.start_supervisor()
    world.until(OrderEnded)
    assert world.events(OrderEnded) == [OrderEnded(1, "obeyed")]
    assert world.replayed.ledger[0].order == HALF
    world.run()


def test_order_that_ranks_do_not_agree_on_is_withdrawn_and_costs_a_restart() -> None:
    """Whoever still might take it later is dead by then."""
    world = a_run(steps=60).until_step(5)
    world.deaf = True
    world.give(HALF)
    world.until(FailureSeen)
    assert "did not agree on order 1" in world.events(FailureSeen)[0].what
    assert world.events(OrderEnded) == [OrderEnded(1, "withdrawn")]
    world.deaf = False
    world.run()
    assert world.replayed.ledger == ()
    assert world.events(RunFinished)
