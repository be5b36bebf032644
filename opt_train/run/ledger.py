"""The ledger of a run: the lasting orders that its ranks obeyed, each with the step it begins at.

`optim.in_force.in_force(configuration, ledger, step)` makes a step's values of it. An entry holds
from its step on in every attempt that comes there, also after a restart from an older checkpoint:
the steps before are trained again as they were, to the bit, and those behind under the order again.
A new lineage keeps it. To lose an intervention because the code changed would raise the learning
rate without anybody having asked for that.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opt_train.protocol.framing import to_payload
from opt_train.protocol.orders import LedgerEntry, Order, RollBack, make_order

Ledger = tuple[LedgerEntry, ...]
"""Oldest first, by the numbers of the orders."""


@dataclass(frozen=True, slots=True)
class TakenLedger:
    """A ledger that a new run takes from another, to train under it from the start."""

    source: str
    """The full path of the run directory that it is taken from."""
    entries: Ledger
    difference: tuple[str, ...]
    """What of the new run is not as on the surviving line, and changes its weights: `key: there ->
    here`. Empty: they are the same, to the bit."""
    data_fingerprint: str
    """Of the other run's tokens."""

    def difference_on(self, data_fingerprint: str) -> tuple[str, ...]:
        """`difference`, for a run of these tokens."""
        # Known only when the data is prepared, long behind the other checks.
        if data_fingerprint == self.data_fingerprint:
            return self.difference
        there, here = self.data_fingerprint[:12], data_fingerprint[:12]
        return (*self.difference, f"data: tokens {there} -> {here}")


def with_order(ledger: Ledger, order: Order, step: int) -> Ledger:
    """The ledger once `order` was obeyed at the boundary before `step`; each order stands once. Of
    a rollback what came with it, from the step on that it went back to."""
    if isinstance(order, RollBack):
        for change in order.changes:
            ledger = with_order(ledger, change, step)
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
