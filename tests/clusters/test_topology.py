"""Ranks that talk most are neighbours in rank: their nodes must be neighbours in the network, and a
buffer node's place is near the one it takes over."""

import pytest

from opt_train.clusters import slurm_commands
from opt_train.clusters.slurm_topology import ask_topology, expanded, parse_topology
from opt_train.clusters.topology import Topology

TREE = """\
SwitchName=s0 Level=0 LinkSpeed=1 Nodes=tux[0-3]
SwitchName=s1 Level=0 LinkSpeed=1 Nodes=tux[4-7]
SwitchName=s2 Level=0 LinkSpeed=1 Nodes=tux[8-10]
SwitchName=s3 Level=1 LinkSpeed=1 Nodes=tux[0-7] Switches=s[0-1]
SwitchName=s4 Level=1 LinkSpeed=1 Nodes=tux[8-10] Switches=s2
SwitchName=s5 Level=2 LinkSpeed=1 Nodes=tux[0-10] Switches=s[3-4]
"""
BLOCKS = """\
BlockName=b1 BlockIndex=0 Nodes=dgx[01-02] BlockSize=2
BlockName=b2 BlockIndex=1 Nodes=dgx[03-04] BlockSize=2
BlockName=b3 BlockIndex=2 Nodes=dgx[05-06] BlockSize=2
AggregatedBlock=b[1-2] BlockIndex=3 Nodes=dgx[01-04] BlockSize=4
"""


def test_a_tree_says_how_far_nodes_are_from_each_other() -> None:
    tree = parse_topology(TREE)
    assert tree.distance("tux0", "tux3") == 0
    assert tree.distance("tux0", "tux4") == 1
    assert tree.distance("tux7", "tux8") == tree.distance("tux8", "tux7") == 2
    assert tree.distance("tux0", "elsewhere") == 0, "of that one nothing is known"


def test_blocks_of_blocks_are_levels_too() -> None:
    blocks = parse_topology(BLOCKS)
    assert blocks.distance("dgx01", "dgx02") == 0
    assert blocks.distance("dgx01", "dgx03") == 1
    assert blocks.distance("dgx01", "dgx05") > 1


def test_neighbours_in_the_order_are_neighbours_in_the_network() -> None:
    """Names of a site may have nothing to do with its racks."""
    wired = parse_topology(
        "SwitchName=s10 Level=0 LinkSpeed=1 Nodes=n[1,3,5]\n"
        "SwitchName=s9 Level=0 LinkSpeed=1 Nodes=n[2,4,10]\n"
        "SwitchName=top Level=1 LinkSpeed=1 Nodes=n[1-5,10] Switches=s[9-10]\n"
    )
    nodes = ("n1", "n2", "n3", "n4", "n5", "new", "n10")
    assert wired.ordered(nodes) == ("n2", "n4", "n10", "n1", "n3", "n5", "new")


@pytest.mark.parametrize("text", ["", "No topology information available\n", "SwitchName=s0\n"])
def test_where_nothing_is_known_nothing_changes(text: str) -> None:
    known = parse_topology(text)
    assert known == Topology()
    assert known.ordered(("n9", "n10", "n1")) == ("n9", "n10", "n1")
    assert known.distance("n9", "n1") == 0


@pytest.mark.parametrize(
    ("hostlist", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,08],login", ["n1", "n2", "n3", "n08", "login"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("r[1-2]-ib", ["r1-ib", "r2-ib"]),
    ],
)
def test_slurms_lists_are_expanded(hostlist: str, names: list[str]) -> None:
    assert list(expanded(hostlist)) == names


def test_a_controller_that_refuses_keeps_no_run_from_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*command: str) -> str:
        raise slurm_commands.SlurmError(f"{command[0]}: no topology plugin")

    monkeypatch.setattr(slurm_commands, "ask", refuse)
    assert ask_topology() == Topology()
