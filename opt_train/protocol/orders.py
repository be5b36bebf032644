"""Orders: what the supervisor asks of the training loop, and the ledger of those that last.

An order reaches rank 0 alone, through its agent. Its number rides in the step stats that all ranks
reduce once a step, so that every rank obeys at the same boundary; the body is broadcast only when
the number moved. (Ranks that each read their own pipe obeyed 19 to 20 of 20 orders at different
steps.) Numbers grow by one over the life of a run, and orders are obeyed in their order.

An order is one frozen dataclass, and that is all there is to declare: it is its own wire form and
its own payload in the journal (`order_given`), and `change` says what it does to the values in
force. A lasting one enters the ledger when the ranks obey it. The ledger travels in `Begin`, in the
state of training and in every manifest, and `in_force` is its only reader.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from opt_train.protocol.framing import Message, ProtocolError, from_payload, to_payload


@dataclass(frozen=True, slots=True)
class Order(Message):
    """Base of all orders. A subclass adds its parameters as fields."""

    number: int
    reason: str

    lasting: ClassVar[bool] = False
    """It stays in force behind the boundary at which it is obeyed, and so enters the ledger."""

    def change(self, values: Mapping[str, float], steps: int) -> Mapping[str, float]:
        """The values of a step under this order, given those without it.

        Pure: ranks, supervisor and whoever reads a checkpoint must come to the same numbers.

        Args:
            values: as `in_force` names them: lr, beta1, beta2, eps, weight_decay, clip, and
                loss_scale where it is fixed.
            steps: taken since the boundary at which it was obeyed; 0 for the first.
        """
        return values


@dataclass(frozen=True, slots=True)
class SaveAndStop(Order, kind="save_and_stop"):
    """Save a checkpoint at this boundary and leave with exit code 75."""


@dataclass(frozen=True, slots=True)
class UnknownOrder(Order):
    """An order of a newer version, as a journal or a checkpoint told it. It is never sent."""

    # Lasting, so that it stays in the ledger and stops a start, instead of vanishing from the
    # values.
    name: str = ""

    lasting: ClassVar[bool] = True

    def change(self, values: Mapping[str, float], steps: int) -> Mapping[str, float]:
        """Nothing can be said of the values any more.

        Raises:
            ValueError: always; training under values that nobody knows would be a guess.
        """
        raise ValueError(f"order {self.number} ({self.name}) in the ledger is not known here")


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A lasting order in force from batch `step` (from 0) on, in whatever attempt comes there."""

    step: int
    order: Order


def parameters_of(order: Order) -> dict[str, Any]:
    """The order's own fields as JSON values: what `order_given` keeps beside number and reason."""
    payload = to_payload(order)
    return {k: v for k, v in payload.items() if k not in ("kind", "number", "reason")}


def make_order(kind: str, number: int, reason: str, parameters: Mapping[str, Any]) -> Order:
    """The order that a journal line tells; an `UnknownOrder` where this version knows no such."""
    try:
        payload = {"kind": kind, "number": number, "reason": reason, **parameters}
        order = from_payload(payload)
    except ProtocolError:
        order = None
    return order if isinstance(order, Order) else UnknownOrder(number, reason, kind)
