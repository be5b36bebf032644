"""An order that the product does not have, to prove that orders need nothing but a dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from opt_train.protocol.orders import Order


@dataclass(frozen=True, slots=True)
class LrFactor(Order, kind="test_lr_factor"):
    """Multiply the learning rate from here on."""

    factor: float

    lasting: ClassVar[bool] = True

    def change(self, values: Mapping[str, float], steps: int) -> Mapping[str, float]:
        return {**values, "lr": values["lr"] * self.factor}
