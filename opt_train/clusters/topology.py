"""The network between nodes as far as somebody knows it: who is near whom. Pure, and of no kind of
cluster.

A node's *path* names the switches above it, the root first and its leaf switch last. Two nodes are
as far from each other as the levels up to the switch that both are below. Of a node without a path
nothing is known: it is as far from all as everybody is.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """Node -> path. Without any, order and distances are as if there were no network."""

    paths: Mapping[str, Path] = field(default_factory=dict)

    def ordered(self, nodes: Collection[str]) -> tuple[str, ...]:
        """`nodes` such that neighbours in the order are neighbours in the network, by name below
        one switch; as they are where nothing is known."""
        if not any(node in self.paths for node in nodes):
            return tuple(nodes)
        # Those of which nothing is known stand behind the others, as they are.
        known = [node for node in nodes if node in self.paths]
        unknown = [node for node in nodes if node not in self.paths]
        return (*sorted(known, key=self._place), *unknown)

    def _place(self, node: str) -> tuple[object, ...]:
        return [natural(switch) for switch in self.paths[node]], natural(node)

    def distance(self, one: str, other: str) -> int:
        """Levels from the farther of two nodes up to the switch that both are below; 0: below the
        same leaf switch, or nothing is known of one."""
        above, beside = self.paths.get(one, ()), self.paths.get(other, ())
        if not above or not beside:
            return 0
        common = 0
        for own, others in zip(above, beside, strict=False):
            if own != others:
                break
            common += 1
        return max(len(above), len(beside)) - common


def natural(name: str) -> list[tuple[int, str]]:
    """A key that puts ``n9`` before ``n10``."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts if part]
