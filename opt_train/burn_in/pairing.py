"""Which nodes meet in which round, and whom the outcome of their meetings names. Pure.

An all-reduce of all nodes at once says that something is wrong; pairs say who. In a round every
node meets one other, as in a chess tournament; from round to round it is another one. A meeting
goes well if both nodes are well (and the cable between them). So whoever has one good meeting is
well, and whoever has none, though it met a node that is well, is not::

    round 1   n1-n2 well   n3-n4 FAILED        n1, n2 are well; n3 or n4 is not
    round 2   n1-n3 well   n2-n4 FAILED        n3 is well, so n4 is not

With more rounds than bad nodes each good node meets a good one, and nobody is left in doubt. (An
odd number of nodes takes a round more, since one rests in each.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[str, str]


def pairings(nodes: Sequence[str], rounds: int) -> list[list[Pair]]:
    """Up to `rounds` rounds, of pairs that are all different; in each a node is at most once.

    With an odd number of nodes one rests in each round. There are at most as many rounds as it
    takes until all have met all.
    """
    # The circle method: the first stays, the others move on by one from round to round.
    circle: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    made = []
    for _ in range(min(rounds, max(0, len(circle) - 1))):
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        made.append([(a, b) for a, b in facing if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return made


@dataclass(frozen=True, slots=True)
class Isolation:
    """Whom the meetings name; each sorted."""

    bad: tuple[str, ...]
    """Nodes that failed with one that is well, and are well with nobody."""
    unclear: tuple[str, ...]
    """Nodes that failed with everybody they met, none of whom is known to be well: each may be bad,
    or have met bad ones alone."""
    links: tuple[Pair, ...]
    """Pairs that failed though both are well with others: what lies between them, or chance."""


def isolate(results: Mapping[Pair, bool]) -> Isolation:
    """Whom to blame, of pairs and whether their meeting went well."""
    well = {node for pair, passed in results.items() if passed for node in pair}
    failed = sorted(pair for pair, passed in results.items() if not passed)
    bad = {
        node
        for a, b in failed
        for node, other in ((a, b), (b, a))
        if node not in well and other in well
    }
    doubted = {node for pair in failed for node in pair} - well - bad
    links = tuple(pair for pair in failed if well.issuperset(pair))
    return Isolation(tuple(sorted(bad)), tuple(sorted(doubted)), links)
