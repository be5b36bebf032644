"""The order of a rollback, as it is to be given now."""

from collections.abc import Sequence
from dataclasses import replace

from opt_train.protocol.orders import Order, RollBack
from opt_train.run.checkpoint import BEGINNING
from opt_train.run.state import RunState


def with_rollback(
    state: RunState, orders: Sequence[Order], highest_generation: int
) -> Sequence[Order]:
    """`orders`, if no rollback is among them; else the rollback alone, with the others as its
    changes, as it is to be given now. None at all where there is nothing to go back to, or one is
    under way.

    Args:
        highest_generation: that any rank was ever seen in.
    """
    asked = next((order for order in orders if isinstance(order, RollBack)), None)
    if asked is None:
        return orders
    target = state.rollback_target(asked.step)
    # The beginning is where ranks begin that are given nothing to restore.
    if target is None and asked.step == 0:
        target = BEGINNING
    if target is None or state.rollback is not None:
        return ()
    # One number for what happens at once, and one behind it for each change that it brings.
    number = min(order.number for order in orders)
    others = [order for order in orders if order is not asked]
    given = replace(
        asked,
        number=number,
        step=target.step,
        attempt=state.next_attempt(max(1, state.lineage)),
        generation=max(state.generation, highest_generation) + 1,
        changes=tuple(
            replace(order, number=later) for later, order in enumerate(others, start=number + 1)
        ),
    )
    return (given,)
