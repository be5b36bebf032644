"""The ledger of a run: the lasting orders that its ranks obeyed, each with the step it begins at.

`optim.in_force.in_force(configuration, ledger, step)` makes a step's values of it. An entry holds
from its step on in every attempt that comes there, also after a restart from an older checkpoint:
the steps before are trained again as they were, to the bit, and those behind under the order again.
A new lineage keeps it. To lose an intervention because the code changed would raise the learning
rate without anybody having asked for that.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from opt_train.protocol.framing import to_payload
from opt_train.protocol.orders import LedgerEntry, Order, make_order

Ledger = tuple[LedgerEntry, ...]
"""Oldest first, by the numbers of the orders."""


def with_order(ledger: Ledger, order: Order, step: int) -> Ledger:
    """The ledger once `order` was obeyed at the boundary before `step`; each order stands once."""
    if not order.lasting or any(entry.order.number == order.number for entry in ledger):
        return ledger
    return (*ledger, LedgerEntry(step, order))


def to_json(ledger: Ledger) -> list[dict[str, Any]]:
    """JSON values, as they stand under `ledger` in a checkpoint's state."""
    payload: list[dict[str, Any]] = to_payload(ledger)
    return payload


def from_json(payload: Iterable[Mapping[str, Any]]) -> Ledger:
    """The ledger that `to_json` wrote, whichever version did.

    Raises:
        KeyError, TypeError, ValueError: it is no ledger.
    """
    return tuple(_entry(item) for item in payload)


def _entry(item: Mapping[str, Any]) -> LedgerEntry:
    order = dict(item["order"])
    kind, number, reason = (
        str(order.pop("kind")),
        int(order.pop("number")),
        str(order.pop("reason")),
    )
    return LedgerEntry(int(item["step"]), make_order(kind, number, reason, order))
