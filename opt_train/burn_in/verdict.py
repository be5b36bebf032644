"""What is well: each result against the norms of the site, and all nodes against their majority.
Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from opt_train.burn_in.config import BurnInConfig
from opt_train.burn_in.pairing import Isolation, Pair, isolate
from opt_train.burn_in.results import BurnInResult, BurnInTest
from opt_train.diagnosis.causes import Cause, StorageDetail

Results = Mapping[str, Sequence[BurnInResult]]
"""Node -> what was found of it."""
ByNode = dict[str, list[BurnInResult]]

NORMS = {
    BurnInTest.MATMUL: "flops",
    BurnInTest.DISK: "disk_bytes_per_second",
    BurnInTest.SHARED: "shared_bytes_per_second",
    BurnInTest.PAIR: "pair_bytes_per_second",
    BurnInTest.CORES: "cores",
}
"""Test -> the key with the site's norm for it."""
COMPARED = (
    BurnInTest.MATMUL,
    BurnInTest.GPU_MEMORY,
    BurnInTest.HOST_MEMORY,
    BurnInTest.DISK,
    BurnInTest.SHARED,
    BurnInTest.CORES,
)
"""Tests whose values nodes of one kind share. Pairs are compared where they are isolated."""
STORAGE = (BurnInTest.DISK, BurnInTest.SHARED)
STORAGE_PATIENCE = 5.0
"""Disks and file systems are fast by turns, and so are compared by a smaller part of the
majority."""
FEWEST_COMPARED = 3
"""Of two nodes that differ nobody knows which is right."""


def judged(result: BurnInResult, config: BurnInConfig) -> BurnInResult:
    """`result`, with its trouble if it is below the site's norm."""
    key = NORMS.get(BurnInTest(result.test))
    if result.trouble or key is None or result.value is None:
        return result
    norm = float(getattr(config, key))
    if not norm or result.value >= norm:
        return result
    return slow(result, f"below the site's norm, burn_in.{key}={norm:g}")


def slow(result: BurnInResult, why: str) -> BurnInResult:
    """`result`, in trouble for being slow."""
    assert result.value is not None
    part = f"{result.part}: " if result.part else ""
    on_disk = result.test == BurnInTest.DISK
    of_storage = result.test in STORAGE
    return replace(
        result,
        trouble=f"{part}{in_words(result.value, result.unit)} is {why}",
        cause=Cause.STORAGE if of_storage else Cause.STRAGGLER,
        detail=StorageDetail.NODE_DISK if on_disk else "",
    )


def in_words(value: float, unit: str) -> str:
    """``12.3 GB/s``."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size and "/s" in unit:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


# Against the majority -----------------------------------------------------------------------------


def compared(found: Results, config: BurnInConfig) -> ByNode:
    """`found`, with the trouble of each node that does not keep up with the majority, or computes
    something else."""
    by_node = {node: list(results) for node, results in found.items()}
    if config.majority_share:
        for test in COMPARED:
            reference = majority_of(_slowest(by_node, test))
            for results in by_node.values() if reference is not None else ():
                results[:] = [_kept_up(r, test, reference or 0.0, config) for r in results]
    usual = _usual_fingerprints(by_node)
    for results in by_node.values():
        results[:] = [_like_others(result, usual) for result in results]
    return by_node


def majority_of(values: Mapping[str, float]) -> float | None:
    """What at least half of the nodes reach; None: too few to say."""
    # The median: of a mean one very slow node would take its share.
    return median(values.values()) if len(values) >= FEWEST_COMPARED else None


def _slowest(found: Results, test: BurnInTest) -> dict[str, float]:
    """Node -> the least of its values."""
    # A node is as slow as its slowest slot: the others wait for it in every collective.
    values = {
        node: [r.value for r in results if r.test == test and r.value is not None]
        for node, results in found.items()
    }
    return {node: min(of_node) for node, of_node in values.items() if of_node}


def _kept_up(
    result: BurnInResult, test: BurnInTest, reference: float, config: BurnInConfig
) -> BurnInResult:
    measured = result.test == test and result.value is not None and not result.trouble
    share = config.majority_share / (STORAGE_PATIENCE if test in STORAGE else 1.0)
    if not measured or (result.value or 0.0) >= share * reference:
        return result
    return slow(result, f"far below the {in_words(reference, result.unit)} of the majority")


def _usual_fingerprints(found: Results) -> dict[str, str]:
    """Kind of device -> the fingerprint that most of its devices have; absent: no majority."""
    seen: dict[str, Counter[str]] = {}
    for result in (r for results in found.values() for r in results if r.fingerprint):
        kind, _, fingerprint = result.fingerprint.rpartition(": ")
        seen.setdefault(kind, Counter())[fingerprint] += 1
    usual = {}
    for kind, counts in seen.items():
        (fingerprint, count), *_ = counts.most_common(1)
        if counts.total() >= FEWEST_COMPARED and 2 * count > counts.total():
            usual[kind] = fingerprint
    return usual


def _like_others(result: BurnInResult, usual: Mapping[str, str]) -> BurnInResult:
    kind, _, fingerprint = result.fingerprint.rpartition(": ")
    if result.trouble or usual.get(kind, fingerprint) == fingerprint:
        return result
    trouble = f"{result.part}: its product is another than that of most devices of its kind"
    return replace(result, trouble=trouble, cause=Cause.SILENT_CORRUPTION)


# Clocks -------------------------------------------------------------------------------------------


def clock_results(ahead: Mapping[str, float], config: BurnInConfig) -> dict[str, BurnInResult]:
    """Node -> how far its clock is from the majority's.

    Args:
        ahead: seconds by which each node's clock was ahead of the caller's when its report came;
            what is the same for all of them, such as the way that reports take, does not matter.
    """
    # Not ours: a login node's clock may be the one that is wrong.
    middle = median(ahead.values()) if ahead else 0.0
    results = {}
    for node, seconds in ahead.items():
        off = seconds - middle
        wrong = abs(off) > config.clock_seconds
        results[node] = BurnInResult(
            BurnInTest.CLOCK,
            value=off,
            unit="s",
            remark="from the majority",
            trouble=f"its clock is {off:+.1f} s off that of the majority" if wrong else "",
            cause=Cause.CONFIG if wrong else "",
        )
    return results


# Pairs --------------------------------------------------------------------------------------------


def pair_results(met: Iterable[tuple[Pair, BurnInResult]], config: BurnInConfig) -> ByNode:
    """Node -> what its meetings came to: the fastest of them, and trouble for whoever `isolate`
    names. A meeting went well if the sums were right and it was not slow."""
    meetings = list(met)
    fastest: dict[str, float] = {}
    for pair, result in meetings:
        for node in pair:
            fastest[node] = max(fastest.get(node, 0.0), result.value or 0.0)
    # The fastest of each node: one slow node makes all its partners slow, once.
    reference = majority_of(fastest) or 0.0
    judged_meetings = {
        pair: _judged_meeting(result, reference, config) for pair, result in meetings
    }
    isolation = isolate({pair: not r.trouble for pair, r in judged_meetings.items()})
    by_node: ByNode = {node: [] for node in fastest}
    for node, value in fastest.items():
        own = {pair: result for pair, result in judged_meetings.items() if node in pair}
        by_node[node].append(_of_node(node, own, isolation, value))
    return by_node


def _judged_meeting(result: BurnInResult, reference: float, config: BurnInConfig) -> BurnInResult:
    result = judged(result, config)
    if result.trouble or result.value is None:
        return result
    if result.value < config.majority_share * reference:
        return slow(result, f"far below the {in_words(reference, result.unit)} of the majority")
    return result


def _of_node(
    node: str, own: Mapping[Pair, BurnInResult], isolation: Isolation, fastest: float
) -> BurnInResult:
    failed = {pair: result for pair, result in own.items() if result.trouble}
    others = ", ".join(b if a == node else a for a, b in failed)
    result = BurnInResult(
        BurnInTest.PAIR,
        value=fastest or None,
        unit="B/s",
        remark=_remark(own.values()),
    )
    if node in isolation.bad:
        why = next(iter(failed.values()))
        trouble = f"its all-reduce failed with {others}, who are well with others: {why.trouble}"
        return replace(result, trouble=trouble, cause=why.cause, detail=why.detail)
    if node in isolation.unclear:
        # No cause: to take out a node that is well, for its partner's sake, would be wrong.
        why = next(iter(failed.values()))
        trouble = f"it or {others} is bad, and no other meeting says which: {why.trouble}"
        return replace(result, trouble=trouble, cause=Cause.UNKNOWN)
    if failed:
        return replace(result, remark=f"well, but not with {others}: {result.remark}")
    return result


def _remark(results: Iterable[BurnInResult]) -> str:
    return ", ".join(sorted({result.remark for result in results if result.remark}))
