"""A site with a Slurm, as a user of `opt-train submit` finds it."""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clusters import apptainer
from tests.end_to_end import driving
from tests.slurm import fake_nvml
from tests.slurm.slurm_lab import SlurmLab, missing

UNABLE = missing()
OPT_TRAIN = str(Path(sys.executable).with_name("opt-train"))
NODES = 4
CONTAINER = (
    "cluster=slurm-apptainer",
    "cluster.slurm.container_image=/images/train.sif",
    f"cluster.slurm.container_python={sys.executable}",
    "cluster.slurm.container_mounts=/usr:/usr:ro",
)


class Site:
    """Four nodes with a GPU each, three service nodes for supervisors, and a user's folder."""

    def __init__(self, slurm: SlurmLab, folder: Path, environment: dict[str, str]) -> None:
        self.slurm, self.folder, self.environment = slurm, folder, environment
        self.run = driving.run_directory(folder)
        self.job = ""
        """Of the supervisor."""

    def say(self, *words: str) -> str:
        """What `opt-train` answers on the login node."""
        return self.slurm.run(OPT_TRAIN, *words, cwd=self.folder, environment=self.environment)

    def use_apptainer(self, folder: Path) -> None:
        """Have a stand-in for apptainer on the PATH; `folder` takes it, and the file `said` of
        what it was given."""
        programs = folder / "programs"
        programs.mkdir()
        stand_in = programs / "apptainer"
        words = shlex.join([sys.executable, apptainer.__file__])
        stand_in.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        stand_in.chmod(0o755)
        inside = folder / "inside"
        inside.mkdir()
        (inside / "touch").symlink_to(str(shutil.which("touch")))
        self.environment |= {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "APPTAINER_PATH": str(inside),
            "APPTAINER_SAID": str(folder / "said"),
        }

    def submit(self, *overrides: str) -> None:
        tiny = [override for override in driving.TINY if not override.startswith("cluster")]
        named = any(override.startswith("cluster=") for override in overrides)
        answer = self.say(
            "submit",
            *tiny,
            *([] if named else ["cluster=slurm"]),
            "supervisor.orphan_seconds=60",
            f"data.directory={driving.prepared()}",
            "name=run",
            "cluster.slurm.supervisor_partition=service",
            *overrides,
        )
        self.job = answer.split(" as job ")[1].split(";")[0]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120, what: str = "") -> None:
        deadline = time.monotonic() + driving.PATIENCE * seconds
        while not condition():
            logs = [*self.run.submit.glob("*.log"), *self.run.nodes.glob("*/agent.log")]
            assert time.monotonic() < deadline, "\n".join(
                (what, self.state(), *(f"{log}:\n{log.read_text()[-2000:]}" for log in logs))
            )
            time.sleep(0.2)

    def state(self) -> str:
        """What Slurm says of jobs and nodes, for a failed test."""
        return "\n".join((self.slurm.run("squeue"), self.slurm.run("sinfo", "--format=%N %T %E")))

    def jobs(self) -> list[str]:
        """Everything that is queued or runs."""
        return self.slurm.run("squeue", "--noheader", "--format=%A").split()

    def allocations(self, *, running: bool = False) -> list[str]:
        """Every job but the supervisor's. `running`: only those that have nodes."""
        asked = ("--states=RUNNING",) if running else ()
        found = self.slurm.run("squeue", "--noheader", "--format=%A", *asked).split()
        return [job for job in found if job != self.job]

    def node_of(self, job: str) -> str:
        return self.slurm.run("squeue", "--noheader", f"--jobs={job}", "--format=%N")


def supervisors(site: Site) -> list[int]:
    """Pids of the run's supervisors, as the machine around the namespaces sees them."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            on_slurm = any(word.startswith(b"cluster=slurm") for word in words)
            is_one = b"run" in words and on_slurm and not words[0].endswith(b"bash")
            if is_one and (path / "cwd").resolve() == site.folder:
                found.append(int(path.name))
    return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "work"
    folder.mkdir()
    environment = fake_nvml.build(tmp_path / "nvml") | {"OMP_NUM_THREADS": "1"}
    with SlurmLab(tmp_path / "slurm", nodes=NODES, service_nodes=3, gpus=1) as slurm:
        for number in range(1, NODES + 1):
            fake_nvml.set_values(slurm.disk(f"n{number}"), f"n{number}", count=1)
        yield Site(slurm, folder, environment)
    assert driving.processes_of(tmp_path) == [], "the lab left processes behind"
