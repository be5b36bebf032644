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

PROBE_BATCHES = 4
"""Global batches that are measured at each place of a probe."""


@dataclass(frozen=True, slots=True)
class Order(Message):
    """Base of all orders. A subclass adds its parameters as fields."""

    number: int
    reason: str

    lasting: ClassVar[bool] = False
    """It stays in force behind the boundary at which it is obeyed, and so enters the ledger."""

    @property
    def last_number(self) -> int:
        """The number up to which orders are given with this one."""
        return self.number

    def change(self, values: Mapping[str, float], steps: int) -> Mapping[str, float]:
        """The values of a step under this order, given those without it.

        Pure: ranks, supervisor and whoever reads a checkpoint must come to the same numbers.

        Args:
            values: as `in_force` names them: lr, beta1, beta2, eps, weight_decay, clip, samples,
                embedding_gradient, loss_scale where it is fixed, and loss_scale_floor where there
                is a scale.
            steps: taken since the boundary at which it was obeyed; 0 for the first.
        """
        return values


@dataclass(frozen=True, slots=True)
class SaveAndStop(Order, kind="save_and_stop"):
    """Save a checkpoint at this boundary and leave with exit code 75."""


@dataclass(frozen=True, slots=True)
class ScaleLr(Order, kind="scale_lr"):
    """Multiply the learning rate from here on. A factor above 1 gives back what others took: the
    schedule is never exceeded."""

    factor: float

    lasting: ClassVar[bool] = True

    def change(self, values: Mapping[str, float], steps: int) -> Mapping[str, float]:
        return {**values, "lr": values["lr"] * self.factor}


@dataclass(frozen=True, slots=True)
class SetClip(Order, kind="set_clip"):
    """Clip the gradient to another norm from here on."""

    clip: float

    lasting: ClassVar[bool] = True

    def change(self, values: Mapping[str, float], steps: int) -> Mapping[str, float]:
        return {**values, "clip": self.clip}


@dataclass(frozen=True, slots=True)
class SkipSamples(Order, kind="skip_samples"):
    """Leave out the next samples of the order of the data, for good."""

    samples: int
    after: int = 0
    """Steps that are trained before."""

    lasting: ClassVar[bool] = True

    def change(self, values: Mapping[str, float], steps: int) -> Mapping[str, float]:
        if steps < self.after:
            return values
        return {**values, "samples": values["samples"] + self.samples}


@dataclass(frozen=True, slots=True)
class SetLossScale(Order, kind="set_loss_scale"):
    """Go on from another loss scale, or with another floor below it. Changes nothing where
    gradients are not scaled."""

    scale: float = 0.0
    """What the next step is taken with, a power of two; from there on a dynamic one moves by
    itself, a fixed one stays. 0: as it is."""
    floor: float = 0.0
    """It falls no further, a power of two; 0: as it is."""
    window_steps: int = 0
    """With a scale: the window from here on; 0: the configured one. It counts anew either way."""

    lasting: ClassVar[bool] = True

    def change(self, values: Mapping[str, float], steps: int) -> Mapping[str, float]:
        if "loss_scale_floor" not in values:
            return values
        changed = {**values}
        if self.floor:
            changed["loss_scale_floor"] = self.floor
        # A dynamic scale is state: what it is at later steps only their gradients know.
        if self.scale and (steps == 0 or "loss_scale" in values):
            changed["loss_scale"] = self.scale
            if self.window_steps:
                changed["loss_scale_window_steps"] = self.window_steps
        return changed


@dataclass(frozen=True, slots=True)
class ScaleEmbeddingGradient(Order, kind="scale_embedding_gradient"):
    """Multiply the embedding's gradient from here on, before its norm is taken."""

    factor: float

    lasting: ClassVar[bool] = True

    def change(self, values: Mapping[str, float], steps: int) -> Mapping[str, float]:
        return {**values, "embedding_gradient": values["embedding_gradient"] * self.factor}


@dataclass(frozen=True, slots=True)
class RollBack(Order, kind="roll_back"):
    """Go back to the state of an earlier step, and train on from there under `changes`.

    Ranks that have a snapshot of it do so in place, and are `generation` and `attempt` from then
    on. A restart does it as well: from a checkpoint that is no newer, whatever it was for.
    """

    step: int
    attempt: str
    generation: int
    changes: tuple[Order, ...] = ()
    """Lasting orders, which hold from the step on that is gone back to; numbered behind this
    one."""
    probe: tuple[int, ...] = ()
    """Places in the order of the data, in samples, at which the state gone back to is to say what
    it finds there (`facts.Probed`)."""

    @property
    def last_number(self) -> int:
        return max([self.number, *(change.number for change in self.changes)])


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
