"""Agents and ranks in a container, on a real Slurm: `apptainer` is a stand-in that really runs the
command, without Slurm's commands on its PATH (tests/clusters/apptainer.py). pyxis is a plugin of
Slurm's that is not installed here; tests/clusters/test_containers.py reads its options."""

import json
import os
import shlex
from pathlib import Path

import pytest

from tests.end_to_end import driving
from tests.slurm.site import CONTAINER, UNABLE, Site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
]


def variables_of(pid: int) -> dict[str, str]:
    """The environment that a process began with, as the machine around the namespaces sees it."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)


def test_agents_in_a_container_train_and_give_their_allocation_back(
    site: Site, tmp_path: Path
) -> None:
    site.use_apptainer(tmp_path)
    site.submit(
        *CONTAINER,
        "cluster.nodes=1",
        *driving.ENDLESS,
        "supervisor.orphan_seconds=10",
    )
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    image = "/images/train.sif"
    ranks = [pid for pid in driving.processes_of(site.folder) if is_rank(pid)]
    assert ranks
    for pid in ranks:
        assert variables_of(pid)["APPTAINER_CONTAINER"] == image
    code = str(site.run.path / "code" / "1")
    assert variables_of(ranks[0])["PYTHONPATH"].split(":")[0] == code
    said = shlex.split((tmp_path / "said").read_text())
    assert said == [
        f"image={image}",
        f"bind={site.run.path}:{site.run.path}",
        f"bind={driving.prepared()}:{driving.prepared()}",
        "bind=/usr:/usr:ro",
        "nv=True",
        "pwd=",
    ]
    assert json.loads((site.run.nodes / "n1" / "agent.json").read_text())["node"] == "n1"

    # Nobody leads any more, and inside there is no scancel: the step beside the agent does it.
    site.slurm.run("scancel", site.job)
    site.wait_for(lambda: site.allocations() == [], 90, what="the allocation was forgotten")
    site.wait_for(lambda: driving.processes_of(site.folder) == [], what="processes were left")


def is_rank(pid: int) -> bool:
    return b"tests.end_to_end.slow_rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
