"""A back end that is not `local`: a real event loop, links by TCP, a node that loses its power."""

import inspect
import io

import pytest
from opt_logbook.record import journal
from opt_logbook.record.events import Note
from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.cluster import Cluster, NodeState
from opt_train.clusters.config import ClusterConfig
from opt_train.clusters.local import LocalCluster
from opt_train.clusters.slurm import SlurmCluster
from opt_train.link.address import read_address
from opt_train.link.endpoint import TcpEndpoint
from opt_train.supervisor.effects import Effect, Finish, StartAgent
from opt_train.supervisor.inputs import AgentConnected, ClusterObserved, Input, Now, Tick
from opt_train.supervisor.shell import start
from tests.agent.harness import config_of, created
from tests.clusters.simulated import SimulatedCluster
from tests.supervisor.shell.tiny_core import TinyCore, entry


@pytest.mark.parametrize("back_end", [LocalCluster, SimulatedCluster, SlurmCluster])
def test_a_back_end_pays_every_duty_with_the_protocols_arguments(back_end: type) -> None:
    duties = {name: duty for name, duty in vars(Cluster).items() if not name.startswith("_")}
    assert "start_agent" in duties
    for name, duty in duties.items():
        paid = inspect.getattr_static(back_end, name)
        assert isinstance(paid, property) == isinstance(duty, property), name
        if not isinstance(duty, property):
            asked, given = inspect.signature(duty), inspect.signature(paid)
            assert list(asked.parameters) == list(given.parameters), name


def test_a_run_on_simulated_nodes_is_led_by_tcp_and_sees_one_fail(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = SimulatedCluster(run, ClusterConfig(nodes=1, buffer_nodes=1))
    monkeypatch.setattr(start, "make_cluster", lambda config, run, code: cluster)
    connected: set[str] = set()
    begun = False

    def react(received: Input, now: Now) -> list[Effect] | None:
        nonlocal begun
        match received:
            case Tick() if not begun:
                begun = True
                return [StartAgent("node-2")]  # the core has begun with the first
            case AgentConnected(node=node):
                connected.add(node)
                if connected == {"node-1", "node-2"}:
                    address = read_address(run.supervisor_address)
                    assert address is not None
                    assert isinstance(address.endpoint, TcpEndpoint)
                    assert address.endpoint.host == "127.0.0.1"
                    cluster.fail("node-1")
                return []
            case ClusterObserved(nodes=nodes, reasons=reasons) if nodes["node-1"] == "down":
                return [entry(now, Note("core", reasons["node-1"])), Finish(0, "seen")]
        return []

    core = TinyCore(run, react)
    code = start.supervise(config_of(run), run, created(), make_core=core, stream=io.StringIO())
    assert code == 0
    assert connected == {"node-1", "node-2"}
    noted = [e.event for e in journal.read(run.journal).entries if isinstance(e.event, Note)]
    assert [note.text for note in noted] == ["no power"]
    assert cluster.living_agents() == (), "no allocation outlives its run"
    assert cluster.observe()["node-2"].state == NodeState.UNKNOWN
