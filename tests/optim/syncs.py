"""An instrument: what makes a host wait for its device."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "is_nonzero", "aten.equal", "aten.nonzero")


class Syncs(TorchDispatchMode):
    """Counts operations whose result the host needs: every `.item()`, `bool(tensor)` and mask is one of these."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITS):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
