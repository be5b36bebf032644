"""What a step allocates and sends, counted at torch's dispatcher, with tensors that may have no
contents."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opt_train.optim.clip import local_part


@dataclass(frozen=True, slots=True)
class Sent:
    """Collectives of one kind that one rank takes part in during a step."""

    kind: str
    """``all_gather``, ``reduce_scatter``, ``all_reduce``, ``all_to_all`` or ``broadcast``."""
    ranks: int
    """The group's size."""
    bytes: int
    """Of the whole tensor that is gathered, scattered or reduced, over all of them."""
    count: int


@dataclass(frozen=True, slots=True)
class TensorsAtPeak:
    """Tensors of one kind that were there at the moment of the peak."""

    origin: str
    """The operation that made them, and their shape."""
    bytes: int
    """Each one's."""
    count: int


@dataclass(frozen=True, slots=True)
class Peak:
    """The moment when most was allocated."""

    bytes: int
    phase: str
    tensors: list[TensorsAtPeak]


class MemoryCount(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Every storage that an operation makes, from its first byte to its last, and the moment when
    they were most.

    After torch's `MemTracker`, which takes an optimizer's DTensors for whole tensors and knows one
    micro-batch alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.live = 0
        self.largest = 0
        self._trying = False
        self._phase = "forward"
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._log: list[tuple[int, str, str]] = []
        self._patches = ExitStack()

    def count_existing(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._count(local_part(tensor), what)
        self.largest = 0

    def enter(self, phase: str, notes: list[int] | None = None) -> None:
        """Another part of the step begins; `notes` gets what is allocated now."""
        self._phase = phase
        if notes is not None:
            notes.append(self.live)

    def __enter__(self) -> Self:
        with ExitStack() as patches:
            # FSDP frees gathered weights so, without an operation.
            patches.enter_context(patch.object(torch.UntypedStorage, "resize_", self._resizing()))
            # DTensor tries each operation on whole tensors to learn the shape of the result.
            name = "_propagate_tensor_meta_non_cached"
            patches.enter_context(patch.object(ShardingPropagator, name, self._not_counting(name)))
            self._patches = patches.pop_all()
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, *raised: Any) -> None:
        self._patches.close()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]  # torch's

    def _resizing(self) -> Callable[..., Any]:
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            if id(storage) in self._known:
                reference, before, what = self._known[id(storage)]
                self._known[id(storage)] = reference, size, what
                self._note(size - before, what)
            return resize(storage, size)

        return resize_

    def _not_counting(self, name: str) -> Callable[..., Any]:
        method = getattr(ShardingPropagator, name)

        def call(*args: Any) -> Any:
            self._trying = True
            try:
                return method(*args)
            finally:
                self._trying = False

        return call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its part comes by on its own
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # a fake one would be a copy
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result) if not self._trying else ():
            if isinstance(value, Tensor) and not isinstance(value, DTensor):
                self._count(value, f"{func._schema.name.split('::')[1]}{[*value.shape]}")
        return result

    def _count(self, tensor: Tensor, what: str) -> None:
        storage = tensor.untyped_storage()
        # An id may be given again after a storage has died; the weak reference forgets the old one
        # first.
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), size, what
        self.largest = max(self.largest, size)
        self._note(size, what)

    def _forget(self, key: int) -> None:
        _, size, what = self._known.pop(key)
        self._note(-size, what)

    def _note(self, change: int, what: str) -> None:
        self.live += change
        self._log.append((change, what, self._phase))

    def peak(self) -> Peak:
        """The moment when most was allocated."""
        # From the log, since only at the end is it known which moment was the peak.
        live = highest = when = 0
        for number, (change, _, _) in enumerate(self._log):
            live += change
            if live > highest:
                highest, when = live, number
        counts: Counter[tuple[str, int]] = Counter()
        for change, what, _ in self._log[: when + 1]:
            counts[what, abs(change)] += 1 if change > 0 else -1
        largest = sorted(counts.items(), key=lambda item: -item[0][1] * item[1])
        shown = [
            TensorsAtPeak(what, size, count)
            for (what, size), count in largest
            if count and what not in ("parameters", "optimizer")
        ]
        return Peak(highest, self._log[when][2], shown[:24])


class CollectiveCount(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts collectives by kind and group, at whichever of torch's two interfaces they are asked
    for."""

    KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._count: Counter[tuple[str, int]] = Counter()
        self._bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            flat = name.strip("_").replace("_", "")
            kind = next(kind for kind in self.KINDS if flat.startswith(kind.replace("_", "")))
            key = (kind, _ranks(args))
            self._count[key] += 1
            # A gather is as large as its result, a scatter as its input: the larger is the whole
            # tensor.
            self._bytes[key] += max(_sizes((args, result)))
        return result

    def sent(self) -> list[Sent]:
        return [
            Sent(kind, ranks, self._bytes[kind, ranks], count)
            for (kind, ranks), count in self._count.items()
        ]


def _ranks(args: Any) -> int:
    # c10d passes the group as an object, functional collectives its name; an operation such as
    # "sum" is a string too.
    for value in args:
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min"):
            return _resolve_process_group(GroupName(value)).size()
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).size()
    raise AssertionError(f"a collective without a group: {args}")


def _sizes(values: Any) -> list[int]:
    if isinstance(values, Tensor):
        return [values.numel() * values.element_size()]
    if isinstance(values, (tuple, list)):
        return [
            sum(_sizes(value)) if isinstance(value, list) else max(_sizes(value), default=0)
            for value in values
        ]
    return []
