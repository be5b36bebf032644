"""`sbatch launch/one-node.sbatch` under a real Slurm: the time limit costs nothing, a cancelled job
stays cancelled."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from opt_logbook.record.verify import verify

from tests.end_to_end import driving
from tests.slurm.slurm_lab import SlurmLab, missing

ROOT = Path(__file__).resolve().parents[2]
UNABLE = missing()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
]


class Site:
    """A Slurm of one node, and a folder to submit from that holds prepared data, as a user's
    would."""

    def __init__(self, slurm: SlurmLab, folder: Path) -> None:
        self.slurm = slurm
        self.folder = folder
        self.environment = {
            "OPT_TRAIN": str(Path(sys.executable).with_name("opt-train")),
            "OMP_NUM_THREADS": "1",
        }
        self.run = driving.run_directory(folder)
        self.job = ""

    def submit(self, *overrides: str) -> None:
        script = str(ROOT / "launch" / "one-node.sbatch")
        words = [
            "sbatch",
            "--parsable",
            "--output=job.log",
            script,
            *driving.TINY,
            "name=run",
            *overrides,
        ]
        self.job = self.slurm.run(*words, cwd=self.folder, environment=self.environment)

    def state(self) -> str:
        return self.slurm.job(self.job)["JobState"]

    def output(self) -> str:
        log = self.folder / "job.log"
        return log.read_text() if log.exists() else ""

    def wait_for(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"{self.slurm.job(self.job)}\n{self.output()}\n{self.slurm.said()}"
            )
            time.sleep(0.1)

    def left_behind(self) -> list[int]:
        """Processes of the run, as the machine around the namespaces sees them."""
        return driving.processes_of(self.folder)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "work"
    folder.mkdir()
    with SlurmLab(tmp_path / "slurm", nodes=1) as slurm:
        yield Site(slurm, folder)
    assert driving.processes_of(tmp_path) == [], "the lab left processes behind"


def test_a_job_runs_to_the_end_of_its_run(site: Site) -> None:
    site.submit("train.steps=12")
    site.wait_for(lambda: site.state() not in ("PENDING", "RUNNING", "COMPLETING"))
    job = site.slurm.job(site.job)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), (
        site.output()
    )
    assert driving.kinds(site.run)[-1] == "run_finished"
    assert verify(site.run) == []
    assert site.left_behind() == []


def test_the_signal_before_the_time_limit_saves_queues_the_job_again_and_it_finishes(
    site: Site,
) -> None:
    site.submit("train.steps=100")
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    # What `--signal=B:TERM@120` does two minutes before the limit: to the script alone, not to its
    # children.
    site.slurm.run("scancel", "--batch", "--signal=TERM", site.job)
    # Not for PENDING too: a busy machine may look only when the job runs again.
    site.wait_for(lambda: site.slurm.job(site.job)["Restarts"] == "1")
    stopped = driving.of_kind(site.run, "run_stopped")[-1].event
    assert stopped.saved_step >= 12, "the state at the signal was not saved"

    site.wait_for(lambda: site.state() not in ("PENDING", "RUNNING", "COMPLETING"))
    job = site.slurm.job(site.job)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), (
        site.output()
    )
    attempts = driving.of_kind(site.run, "attempt_started")
    assert [entry.step for entry in attempts] == [0, stopped.saved_step], "steps were done twice"
    assert driving.kinds(site.run)[-1] == "run_finished"
    assert driving.of_kind(site.run, "failure_seen") == [], (
        "an announced stop was taken for a failure"
    )
    assert verify(site.run) == []
    assert site.left_behind() == []
    assert f"queueing job {site.job} again" in site.output()


def test_a_cancelled_job_saves_and_stays_cancelled(site: Site) -> None:
    """scancel's TERM looks like the time limit's, and `scontrol requeue` revives even a job that is
    being cancelled."""
    site.submit(*driving.ENDLESS)
    site.wait_for(lambda: driving.newest_step(site.run) >= 12)
    site.slurm.run("scancel", site.job)
    site.wait_for(lambda: site.state() not in ("RUNNING", "COMPLETING"))
    job = site.slurm.job(site.job)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), site.output()
    stopped = driving.of_kind(site.run, "run_stopped")[-1].event
    # Slurm signals every process: the supervisor hears of it twice, from Slurm and from the script,
    # and still saves.
    assert stopped.saved_step == driving.newest_step(site.run), (
        "the steps since the last checkpoint were lost"
    )
    assert "was cancelled" in site.output()
    assert verify(site.run) == []
    assert site.left_behind() == []


def test_the_lab_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("tests.slurm.slurm_lab.PROGRAMS", ("sbatch-of-another-world",))
    assert "sbatch-of-another-world" in missing()
