"""What a real Slurm prints of its topology, with a plugin and without, is what is read."""

from pathlib import Path

import pytest

from opt_train.clusters.slurm_topology import parse_topology
from opt_train.clusters.topology import Topology
from tests.slurm.site import UNABLE
from tests.slurm.slurm_lab import SlurmLab

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
]

WIRED = "SwitchName=s0 Nodes=n[1,3]\nSwitchName=s1 Nodes=n[2,4]\nSwitchName=top Switches=s[0-1]\n"


def shown(slurm: SlurmLab) -> Topology:
    return parse_topology(slurm.run("scontrol", "--oneliner", "show", "topology"))


def test_a_tree_is_read_from_a_real_slurm(tmp_path: Path) -> None:
    with SlurmLab(tmp_path / "lab", nodes=4, topology=WIRED) as slurm:
        tree = shown(slurm)
    assert tree.ordered(("n1", "n2", "n3", "n4")) == ("n1", "n3", "n2", "n4")
    assert [tree.distance("n1", node) for node in ("n1", "n3", "n2")] == [0, 0, 1]


def test_without_a_plugin_nothing_is_known(tmp_path: Path) -> None:
    with SlurmLab(tmp_path / "lab", nodes=1) as slurm:
        assert shown(slurm) == Topology()
