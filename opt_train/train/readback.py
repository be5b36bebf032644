"""Numbers of the device on their way to the host, copied without stopping the device."""

import torch
from torch import Tensor


class Readback:
    """Copies scalars and small tensors to the host, all in one copy, behind what the device has
    been given to do."""

    def __init__(self, *tensors: Tensor) -> None:
        numbers = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        self._event: torch.Event | None = None
        if numbers.device.type == "cpu":
            self._values = numbers
            return
        # Pinned: into pageable memory the copy would make the host wait.
        self._values = torch.empty(numbers.shape, dtype=torch.float64, pin_memory=True)
        self._values.copy_(numbers, non_blocking=True)
        self._event = torch.Event(numbers.device)
        self._event.record()

    def values(self) -> list[float]:
        """The numbers, of all tensors in a row, fp64. Waits until the device had them, not for
        what was queued behind."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.tolist()]
