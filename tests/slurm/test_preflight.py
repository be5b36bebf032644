"""`opt-train preflight` on a real Slurm: of four nodes one has a full disk and another a slow link,
and exactly these are named, each for what it has."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.end_to_end import driving
from tests.slurm.site import CONTAINER, OPT_TRAIN, UNABLE, Site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
]

QUICK = (
    *("burn_in.matmul_size=128", "burn_in.matmul_seconds=0.1", "burn_in.pair_rounds=3"),
    *("burn_in.host_memory_bytes=1000000", "burn_in.file_bytes=1000000"),
    # The nodes of the lab share two cores: they are fast by turns.
    *("burn_in.pair_bytes=1000000", "burn_in.majority_share=0.05"),
)


def on_node(site: Site, node: str, *command: str) -> str:
    """Run a program in the node's own network and mounts, as root does who breaks it."""
    first = (site.slurm.folder / f"{node}.pid").read_text().strip()
    return site.slurm.run("nsenter", "-t", first, "--net", "--mount", "--", *command)


def test_a_full_disk_and_a_slow_link_are_named_and_nothing_else(site: Site) -> None:
    on_node(site, "n2", "mount", "-t", "tmpfs", "-o", "size=64k", "small", "/mnt")
    throttle = "tc qdisc add dev eth0 root tbf rate 10mbit burst 32kbit latency 400ms"
    on_node(site, "n4", *throttle.split())
    tiny = [override for override in driving.TINY if not override.startswith("cluster")]
    words = (*tiny, "cluster=slurm", "cluster.nodes=2", "cluster.buffer_nodes=2", "name=run")
    said = site.slurm.run(
        *("sh", "-c", '"$0" "$@" 2>errors; echo "code $?"', OPT_TRAIN, "preflight", *words, *QUICK),
        *("checkpoint.node_directory=/mnt", "--json"),
        cwd=site.folder,
        environment=site.environment,
    )
    answer, _, code = said.rpartition("code ")
    assert code == "1", (site.folder / "errors").read_text()
    nodes = json.loads(answer)["nodes"]
    troubles = {
        node: [(r["test"], r["trouble"]) for r in results if r["trouble"]]
        for node, results in nodes.items()
    }
    assert [node for node, found in troubles.items() if found] == ["n2", "n4"], troubles
    site_says = site.say("preflight", "--site", "--json", "cluster=slurm")
    powers = {power["power"]: power for power in json.loads(site_says)}
    assert powers["Slurm"]["found"].startswith("version ")
    assert powers["drain a node"]["granted"] == "yes", "the tests are root"
    assert powers["salloc from a job"]["granted"] == "yes"
    assert powers["NVML with events"]["found"].endswith("(on n1)"), "asked on a node"
    [(test, trouble)] = troubles["n2"]
    assert (test, trouble) == ("disk", "/mnt: No space left on device")
    [(test, trouble)] = troubles["n4"]
    assert test == "all-reduce"
    assert "far below the" in trouble
    site.wait_for(lambda: site.jobs() == [], what="the nodes were not given back")
    assert list((site.folder / "runs").iterdir()) == []


def test_nodes_are_tested_in_the_container_that_agents_run_in(site: Site, tmp_path: Path) -> None:
    site.use_apptainer(tmp_path)
    tiny = [override for override in driving.TINY if not override.startswith("cluster")]
    words = (*tiny, *QUICK, *CONTAINER, "cluster.nodes=1", "name=run")
    answer = json.loads(site.say("preflight", *words, "--json"))
    assert answer["failed"] == []
    assert {r["test"] for r in answer["nodes"]["n1"]} >= {"matmul", "shared file system"}
    said = shlex.split((tmp_path / "said").read_text())
    folder = site.folder / "runs" / "run.preflight"
    assert said[:2] == ["image=/images/train.sif", f"bind={folder}:{folder}"]


def test_a_drill_kills_a_node_from_the_login_node(site: Site) -> None:
    site.submit("cluster.nodes=2", "cluster.buffer_nodes=1", *driving.ENDLESS)
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    outcome = json.loads(site.say("drill", str(site.run.path), "--json", "--seconds", "120"))
    assert (outcome["node"], outcome["buffer_node"], outcome["nodes"]) == ("n2", "n3", 2)
    assert outcome["cause"] == "node_failure"
    assert 0 < outcome["detected_seconds"] < outcome["training_seconds"]
    site.say("stop", str(site.run.path))
    site.wait_for(lambda: site.jobs() == [])


PROGRAM = """
import sys, time
from pathlib import Path
from opt_logbook.record.run_directory import RunDirectory
from opt_train.clusters.config import ClusterConfig
from opt_train.clusters.slurm import SlurmCluster

cluster = SlurmCluster(RunDirectory(Path(sys.argv[1])), ClusterConfig(kind="slurm").for_seconds(60))
assert cluster.acquire((), announce=print, stopped=lambda: False)
[node] = cluster.node_names
end = cluster.run_on(node, ["sh", "-c", "hostname; echo bad >&2; exit 3"], 20.0)
assert (end.code, end.output.strip(), end.last_words) == (3, node, "bad"), end
began = time.monotonic()
end = cluster.run_on(node, ["sh", "-c", "trap '' TERM; sleep 77"], 2.0)
assert end.code is None and time.monotonic() - began < 15.0, end
deadline = time.monotonic() + 20.0
while "sleep 77" in cluster.run_on(node, ["ps", "-eo", "args"], 20.0).output.splitlines():
    assert time.monotonic() < deadline, "what was killed runs on"
    time.sleep(0.2)
cluster.release()
"""


def test_a_program_on_a_node_ends_in_time_with_its_output_and_code(site: Site) -> None:
    site.slurm.run(
        *(sys.executable, "-c", PROGRAM, str(site.folder)),
        cwd=site.folder,
        environment=site.environment,
    )
    site.wait_for(lambda: site.jobs() == [])
