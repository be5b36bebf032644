"""A good node that is blamed is taken out of a run, and a bad one that is not goes on to break it:
every set of bad nodes of every small cluster is tried."""

from collections.abc import Iterable
from itertools import combinations

import pytest

from opt_train.burn_in.pairing import Pair, isolate, pairings


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


def meetings(nodes: list[str], rounds: int, bad: Iterable[str]) -> dict[Pair, bool]:
    """A meeting goes well if both are well."""
    pairs = [pair for of_round in pairings(nodes, rounds) for pair in of_round]
    return {pair: not {*pair} & {*bad} for pair in pairs}


@pytest.mark.parametrize("count", range(10))
def test_nobody_meets_two_in_a_round_and_nobody_the_same_one_twice(count: int) -> None:
    rounds = pairings(names(count), rounds=20)
    for pairs in rounds:
        met = [node for pair in pairs for node in pair]
        assert len(met) == len(set(met)) == count // 2 * 2, "with an odd number one rests"
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {frozenset(pair) for pair in combinations(names(count), 2)}


@pytest.mark.parametrize("count", range(2, 9))
def test_with_more_rounds_than_bad_nodes_exactly_these_are_named(count: int) -> None:
    nodes = names(count)
    for rounds in range(1, count + 1):
        # With an odd number each node rests once, and meets one fewer.
        surely = rounds - 1 - count % 2
        for bad_count in range(min(surely, count - 2) + 1):
            for bad in combinations(nodes, bad_count):
                found = isolate(meetings(nodes, rounds, bad))
                assert (found.bad, found.unclear, found.links) == (bad, (), ()), (rounds, bad)


@pytest.mark.parametrize("count", range(2, 8))
def test_a_good_node_is_never_named_and_a_bad_one_is_named_or_doubted(count: int) -> None:
    nodes = names(count)
    for rounds in range(1, count + 1):
        for bad_count in range(count + 1):
            for bad in combinations(nodes, bad_count):
                results = meetings(nodes, rounds, bad)
                found = isolate(results)
                assert {*found.bad} <= {*bad}
                met = {node for pair in results for node in pair}
                assert {*bad} & met <= {*found.bad, *found.unclear}
                assert not found.links


def test_of_two_nodes_nobody_can_say_which_is_bad() -> None:
    found = isolate({("n0", "n1"): False})
    assert (found.bad, found.unclear) == ((), ("n0", "n1"))


def test_two_that_are_well_with_others_are_not_blamed_for_what_lies_between_them() -> None:
    nodes = names(4)
    results = meetings(nodes, 3, bad=()) | {("n0", "n3"): False}
    found = isolate(results)
    assert found.bad == found.unclear == ()
    assert found.links == (("n0", "n3"),)


def test_three_nodes_and_three_rounds_name_the_bad_one() -> None:
    for bad in names(3):
        assert isolate(meetings(names(3), 3, [bad])).bad == (bad,)
