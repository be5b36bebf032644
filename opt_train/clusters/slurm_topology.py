"""The network as Slurm's topology plugins know it, from what ``scontrol show topology`` prints.

``topology/tree`` prints a line a switch, with all nodes below it, leaf switches and those above:

    SwitchName=s0 Level=0 LinkSpeed=1 Nodes=tux[0-3]
    SwitchName=s2 Level=1 LinkSpeed=1 Nodes=tux[0-7] Switches=s[0-1]

``topology/block`` prints a line a block, and one for each block of blocks. Whatever their names,
both say which nodes are together, and the larger of two such groups is the higher.
"""

import itertools
import re
from collections.abc import Iterator

from opt_train.clusters import slurm_commands as slurm
from opt_train.clusters.topology import Topology

_GROUP = re.compile(r"(?:^|\s)(?:SwitchName|BlockName|AggregatedBlock)=(\S+)")
_NODES = re.compile(r"(?:^|\s)Nodes=(\S+)")


def ask_topology() -> Topology:
    """The network of the whole cluster; an empty one where Slurm does not know it or does not
    answer: what only makes a run faster must not keep it from beginning."""
    try:
        return parse_topology(slurm.ask("scontrol", "--oneliner", "show", "topology"))
    except slurm.SlurmError:  # without a plugin some versions call it an error
        return Topology()


def parse_topology(text: str) -> Topology:
    """The network that `text` describes; lines that name no nodes say nothing."""
    groups: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, nodes = _GROUP.search(line), _NODES.search(line)
        if name is not None and nodes is not None and nodes[1] != "(null)":
            groups[name[1]] = list(expanded(nodes[1]))
    # Levels are told by size alone: block topologies number theirs otherwise, and a switch above
    # others has at least their nodes.
    paths: dict[str, list[str]] = {}
    for group in sorted(groups, key=lambda group: (-len(groups[group]), group)):
        for node in groups[group]:
            paths.setdefault(node, []).append(group)
    return Topology({node: tuple(path) for node, path in paths.items()})


def expanded(hostlist: str) -> Iterator[str]:
    """The names of a Slurm list such as ``n[1-3,08],login``, in its order.

    Not by ``scontrol show hostnames``: a large network has hundreds of lists.
    """
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hostlist):
        # Odd parts are what stood in brackets; there may be several: r[1-2]n[01-16].
        parts = re.split(r"\[([^\]]*)\]", item)
        choices = [list(_ranges(p)) if k % 2 else [p] for k, p in enumerate(parts)]
        yield from map("".join, itertools.product(*choices))


def _ranges(text: str) -> Iterator[str]:
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not dash or not (first.isdecimal() and last.isdecimal()):
            yield part
            continue
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))
