"""Numbers become verdicts here: a norm that nobody compares with, or a majority that one slow node
bends, would let a bad node pass or blame a good one."""

from dataclasses import replace

import pytest

from opt_train.burn_in.config import BurnInConfig
from opt_train.burn_in.pairing import Pair, pairings
from opt_train.burn_in.results import BurnInResult, BurnInTest
from opt_train.burn_in.verdict import (
    NORMS,
    ByNode,
    clock_results,
    compared,
    in_words,
    judged,
    pair_results,
)

CONFIG = BurnInConfig()
NAMES = ("n1", "n2", "n3", "n4")


def matmul(flops: float, fingerprint: str = "A100: 1") -> BurnInResult:
    return BurnInResult(
        BurnInTest.MATMUL, "slot 0", value=flops, unit="FLOP/s", fingerprint=fingerprint
    )


def troubled(found: ByNode) -> dict[str, list[str]]:
    by_node = {node: [r.trouble for r in results if r.trouble] for node, results in found.items()}
    return {node: troubles for node, troubles in by_node.items() if troubles}


@pytest.mark.parametrize("test", NORMS)
def test_below_the_norm_of_the_site_is_trouble(test: BurnInTest) -> None:
    config = replace(CONFIG, **{NORMS[test]: 10})
    result = BurnInResult(test, "part", value=9.0, unit="x/s")
    assert f"burn_in.{NORMS[test]}=10" in judged(result, config).trouble
    assert judged(replace(result, value=10.0), config).trouble == ""
    assert judged(result, CONFIG).trouble == "", "0: no norm is asked for"


def test_a_slow_disk_is_the_nodes_own_and_a_slow_file_system_is_not() -> None:
    config = replace(CONFIG, disk_bytes_per_second=10.0, shared_bytes_per_second=10.0)
    disk = judged(BurnInResult(BurnInTest.DISK, "/tmp", value=1.0, unit="B/s"), config)
    shared = judged(BurnInResult(BurnInTest.SHARED, "/runs", value=1.0, unit="B/s"), config)
    assert (disk.cause, disk.detail) == ("storage", "node_disk")
    assert (shared.cause, shared.detail) == ("storage", "")


def test_one_slow_node_is_named_and_the_others_are_not() -> None:
    found = {node: [matmul(100.0)] for node in NAMES} | {"n3": [matmul(40.0)]}
    assert list(troubled(compared(found, CONFIG))) == ["n3"]
    assert compared(found, CONFIG)["n3"][0].cause == "straggler"
    assert troubled(compared(found, replace(CONFIG, majority_share=0.0))) == {}


@pytest.mark.parametrize("test", [BurnInTest.DISK, BurnInTest.SHARED])
def test_storage_is_slow_only_when_it_is_much_slower(test: BurnInTest) -> None:
    def found(slow: float) -> ByNode:
        values = dict.fromkeys(NAMES, 100.0) | {"n1": slow}
        return {n: [BurnInResult(test, "/d", value=v, unit="B/s")] for n, v in values.items()}

    assert troubled(compared(found(20.0), CONFIG)) == {}
    assert list(troubled(compared(found(9.0), CONFIG))) == ["n1"]


def test_two_nodes_are_no_majority() -> None:
    found = {"n1": [matmul(100.0)], "n2": [matmul(1.0, "A100: 2")]}
    assert troubled(compared(found, CONFIG)) == {}


def test_a_device_that_is_always_wrong_in_the_same_way_is_named() -> None:
    found = {node: [matmul(100.0)] for node in NAMES}
    found["n2"] = [matmul(100.0, "A100: 2")]
    [troubles] = troubled(compared(found, CONFIG)).values()
    assert "another than that of most devices of its kind" in troubles[0]
    assert compared(found, CONFIG)["n2"][0].cause == "silent_corruption"


def test_another_kind_of_device_computes_other_bits() -> None:
    found = {node: [matmul(100.0)] for node in NAMES}
    found["n2"] = [matmul(100.0, "H100: 2")]
    assert troubled(compared(found, CONFIG)) == {}


def test_a_clock_is_compared_with_the_majority_and_not_with_ours() -> None:
    ahead = {"n1": 3600.0, "n2": 3600.2, "n3": 3599.9, "n4": 3630.0}
    off = {node: r for node, r in clock_results(ahead, CONFIG).items() if r.trouble}
    assert list(off) == ["n4"]
    assert "+29.9 s" in off["n4"].trouble


# Pairs --------------------------------------------------------------------------------------------


def met(speeds: dict[str, float], rounds: int = 3) -> list[tuple[Pair, BurnInResult]]:
    """Each pair is as fast as the slower of the two."""
    pairs = [pair for of_round in pairings(list(speeds), rounds) for pair in of_round]
    return [
        (pair, BurnInResult(BurnInTest.PAIR, value=min(speeds[n] for n in pair), unit="B/s"))
        for pair in pairs
    ]


@pytest.mark.parametrize("slow", ["n1", "n2", "n3"])
def test_of_three_nodes_the_slow_one_is_named_though_two_of_three_pairs_are_slow(slow: str) -> None:
    speeds = dict.fromkeys(NAMES[:3], 1e9) | {slow: 1e7}
    assert list(troubled(pair_results(met(speeds), CONFIG))) == [slow]


def test_all_below_the_norm_are_in_doubt_and_say_why() -> None:
    """InfiniBand that is used by nobody is no majority's matter."""
    config = replace(CONFIG, pair_bytes_per_second=1e10)
    found = troubled(pair_results(met(dict.fromkeys(NAMES, 1e9)), config))
    assert sorted(found) == sorted(NAMES)
    assert all("burn_in.pair_bytes_per_second=1e+10" in why for [why] in found.values())


def test_a_node_that_fails_with_all_keeps_the_cause_and_one_in_doubt_gets_none() -> None:
    broken = BurnInResult(BurnInTest.PAIR, trouble="connection reset", cause="network")
    results = [(pair, broken if "n4" in pair else r) for pair, r in met(dict.fromkeys(NAMES, 1e9))]
    [[result]] = [r for node, r in pair_results(results, CONFIG).items() if node == "n4"]
    assert (result.cause, "connection reset" in result.trouble) == ("network", True)
    of_two = pair_results([(("n1", "n2"), broken)], CONFIG)
    assert {r.cause for [r] in of_two.values()} == {"unknown"}


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [(3.12e14, "FLOP/s", "312 TFLOP/s"), (2.0, "cores", "2 cores"), (1.25e9, "B/s", "1.25 GB/s")],
)
def test_numbers_are_written_for_people(value: float, unit: str, words: str) -> None:
    assert in_words(value, unit) == words
