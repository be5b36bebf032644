"""An instrument: what makes a host wait for its device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""torch's own words for operations whose result, or its shape, the host needs."""


class Syncs(TorchDispatchMode):
    """Notes operations that a host waits for: `.item()`, `bool(tensor)`, `torch.equal`, masks as
    indices.

    Copies to the host are none of these: `.tolist()`, `.numpy()` and `.cpu()` of a CPU's tensor do
    nothing to see here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Tagged for its masks, or not at all: only these are turned into a list of places.
        if func.overloadpacket in (
            torch.ops.aten.index,
            torch.ops.aten.index_put,
            torch.ops.aten.index_put_,
        ):
            waits = any(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            )
        else:
            waits = not WAITS.isdisjoint(func.tags)
        if waits:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
