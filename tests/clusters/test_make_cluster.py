"""Every kind that a configuration may name has a back end, and no other is guessed."""

from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.config import KINDS, ClusterConfig
from opt_train.clusters.make_cluster import make_cluster
from opt_train.protocol.exits import BadInput


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_back_end_and_to_make_it_starts_nothing(kind: str, tmp_path: Path) -> None:
    config = ClusterConfig(kind=kind, nodes=3, buffer_nodes=1)
    cluster = make_cluster(config, RunDirectory(tmp_path / "run"))
    assert set(cluster.node_names) <= {f"node-{number}" for number in range(1, 5)}
    assert not (tmp_path / "run").exists()


def test_a_local_cluster_has_its_nodes_at_once(tmp_path: Path) -> None:
    config = ClusterConfig(kind="local", nodes=3, buffer_nodes=1)
    cluster = make_cluster(config, RunDirectory(tmp_path / "run"))
    assert cluster.acquire((), announce=lambda _: None, stopped=lambda: False)
    assert len(cluster.node_names) == 4
    assert cluster.living_agents() == ()


def test_an_unknown_kind_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cluster\.kind=slrum is not known; use local"):
        make_cluster(ClusterConfig(kind="slrum"), RunDirectory(tmp_path / "run"))


def test_nodes_of_one_machine_divide_its_cores() -> None:
    assert ClusterConfig(kind="local", nodes=4, slots_per_node=2).ranks_per_machine(8) == 8


def test_a_named_interface_goes_before_the_kinds_own() -> None:
    assert ClusterConfig(kind="local").collectives_interface == "lo"
    assert ClusterConfig(kind="local", interface="eth7").collectives_interface == "eth7"
