"""What `status`, `stop`, `hold` and `resume` do with a run's jobs in Slurm's queue, by programs
that answer as Slurm's do; the run has never begun, or its supervisor is dead."""

import json
from pathlib import Path

import pytest
from opt_logbook.record import inbox
from opt_logbook.record.run_directory import RunDirectory

from opt_train.clusters.slurm_allocation import SUPERVISOR, allocation_name, supervisor_name
from opt_train.run.hold_requests import why_held

PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> {folder}/asked
case "$(basename "$0")" in
  sbatch) echo 18 ;;
  squeue) cat {folder}/jobs ;;
esac
"""


class Site:
    """A login node of a Slurm, with the run `night` that was submitted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunDirectory(Path("runs", "night"))
        self.run.submit.mkdir(parents=True)
        (self.run.submit / SUPERVISOR).write_text("#!/bin/sh\n")
        self.show()

    def show(self, *jobs: str) -> None:
        """Have these lines in the queue: number, name, state, nodes, time left, reason."""
        (self.folder / "jobs").write_text("".join(f"{job}\n" for job in jobs))

    @property
    def supervisor_waits(self) -> str:
        return f"17|{supervisor_name(self.run)}|PENDING||1:00:00|Priority"

    def asked(self, program: str) -> list[str]:
        """What the program was asked."""
        lines = (self.folder / "asked").read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("squeue", "scancel", "sbatch"):
        (programs / name).write_text(PROGRAM.format(folder=tmp_path))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return Site(tmp_path)


def test_a_run_that_waits_in_the_queue_is_told_with_its_reason(site: Site, say) -> None:
    site.show(site.supervisor_waits)
    said = say("status", "name=night")
    assert said.code == 0
    assert "night: new\n" in said.out
    assert "waiting for: Slurm job 17 (supervisor), PENDING (Priority)\n" in said.out
    assert "next: an attempt begins from the beginning\n" in said.out
    payload = json.loads(say("status", "name=night", "--json").out)
    assert [(job["job"], job["task"]) for job in payload["jobs"]] == [("17", "supervisor")]


def test_a_stop_takes_the_job_back_that_waits(site: Site, say) -> None:
    more = f"19|{allocation_name(site.run)}|PENDING||UNLIMITED|Resources"
    site.show(site.supervisor_waits, more)
    said = say("stop", "name=night")
    assert (said.code, said.err) == (0, "")
    assert said.out == "cancelled Slurm job 17, 19, which waited; night: new\n"
    assert site.asked("scancel") == ["17", "19"]
    assert inbox.peek(site.run) == [], "it would stop the next start at once"
    site.show()
    assert say("stop", "name=night").code == 1


def test_a_stop_of_a_job_that_has_just_begun_is_obeyed_by_it(site: Site, say) -> None:
    site.show(site.supervisor_waits.replace("PENDING||", "RUNNING|n1|"))
    said = say("stop", "name=night")
    assert said.out == "asked night to stop, which Slurm job 17 obeys once it leads it\n"
    assert [message["kind"] for message in inbox.peek(site.run)] == ["stop"]


def test_a_run_that_was_never_begun_can_be_held_and_resumed(site: Site, say) -> None:
    site.show(site.supervisor_waits)
    held = say("hold", "name=night", "--reason", "the data is wrong")
    assert "Slurm job 17 ends as soon as it begins" in held.out
    assert "the data is wrong" in why_held(site.run)
    resumed = say("resume", "name=night")
    assert resumed.out == "took back the hold on night; Slurm job 17 (PENDING) goes on with it\n"
    assert why_held(site.run) == ""
    assert not (site.folder / "asked").read_text().count("sbatch")


def test_a_resumed_run_is_submitted_again_as_it_was(site: Site, say) -> None:
    say("hold", "name=night")
    assert say("resume", "name=night").out == (
        "took back the hold on night; submitted it again as Slurm job 18\n"
    )
    assert site.asked("sbatch") == [f"--parsable runs/night/submit/{SUPERVISOR}"]


def test_a_slurm_that_does_not_answer_is_said_and_breaks_nothing(site: Site, say) -> None:
    (site.folder / "programs" / "squeue").write_text("#!/bin/sh\necho down >&2; exit 1\n")
    said = say("status", "name=night")
    assert (said.code, said.err) == (0, "")
    assert "Slurm does not answer: squeue: down\n" in said.out
    stop = say("stop", "name=night")
    assert (stop.code, stop.out, stop.err.count("\n")) == (2, "", 1)
    assert say("hold", "name=night").code == 0
    assert why_held(site.run), "a hold needs no Slurm"
    resumed = say("resume", "name=night")
    assert (resumed.code, resumed.err) == (0, "")
    assert "Slurm does not answer" in resumed.out
    assert why_held(site.run) == ""
