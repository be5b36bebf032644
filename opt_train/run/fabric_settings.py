"""The environment variables that decide how the ranks of a run talk to each other.

One of them, set on one node or since the last restart, can halve the speed of a run or hang it, and
no log says so. So each rank reports what it really has, each attempt has it on record, and what is
not as in the attempt before, or not alike on all ranks, is told.
"""

import hashlib
from collections.abc import Mapping

PREFIXES = ("NCCL_", "TORCH_NCCL_", "FI_", "UCX_", "GLOO_")
"""NCCL; torch's own of it; libfabric; UCX; gloo."""
VALUE_CHARACTERS_MAX = 160
ALL_CHARACTERS_MAX = 2000
"""They travel in a fact, which has 4096 bytes."""
REST = "(others)"
"""Stands for what had no room: the hash of its names and values, so that a change is still seen."""
RANKS_NAMED = 3


def fabric_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Name -> value of the variables with one of `PREFIXES`, in the order of their names."""
    chosen: dict[str, str] = {}
    # In the order of names, so that the same variables are shown each time, and are comparable.
    room = ALL_CHARACTERS_MAX
    rest: list[str] = []
    for name in sorted(name for name in environment if name.startswith(PREFIXES)):
        value = environment[name]
        # As JSON, where one character may take six bytes or more.
        size = len(ascii(name)) + len(ascii(value))
        if len(value) > VALUE_CHARACTERS_MAX or size > room:
            rest.append(f"{name}={value}")
        else:
            chosen[name] = value
            room -= size
    if rest:
        names = ", ".join(line.partition("=")[0][:40] for line in rest[:3])
        digest = hashlib.sha256("\0".join(rest).encode(errors="replace")).hexdigest()[:16]
        chosen[REST] = f"{len(rest)} long ones, such as {names}: sha256 {digest}"
    return chosen


def settings_difference(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """What changed from `before` to `now`, each as `NAME: old -> new`, `not set` for absence."""
    return tuple(
        f"{name}: {before.get(name, 'not set')} -> {now.get(name, 'not set')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


def settings_apart(by_rank: Mapping[int, Mapping[str, str]]) -> tuple[str, ...]:
    """How ranks differ from the first of `by_rank`, each as `rank 3: NAME: the first's -> its`."""
    first = by_rank[min(by_rank)] if by_rank else {}
    apart = {rank: settings_difference(first, by_rank[rank]) for rank in sorted(by_rank)}
    odd = [rank for rank, changes in apart.items() if changes]
    told = [f"rank {rank}: {'; '.join(apart[rank])}" for rank in odd[:RANKS_NAMED]]
    return (*told, f"and {len(odd) - len(told)} ranks more") if len(odd) > len(told) else (*told,)
