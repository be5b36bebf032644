"""What needs no Slurm of the back end for it; tests/slurm runs a real one."""

import shlex
import subprocess
from pathlib import Path

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.cli import main as cli
from opt_train.clusters import slurm_commands
from opt_train.clusters.cluster import NodeState
from opt_train.clusters.config import ClusterConfig, SlurmConfig
from opt_train.clusters.slurm import AgentStep, SlurmCluster, allocation_name, status_of
from opt_train.clusters.slurm_submission import supervisor_script
from opt_train.config.compose import compose
from opt_train.protocol.exits import BadInput


@pytest.mark.parametrize(
    ("state", "agent", "is_now"),
    [
        ("mixed", AgentStep.RUNS, NodeState.UP),
        ("allocated", AgentStep.RUNS, NodeState.UP),
        # An admin's drain is a wish, and the node works on.
        ("draining", AgentStep.RUNS, NodeState.UP),
        ("down*", AgentStep.RUNS, NodeState.DOWN),
        ("down", AgentStep.ENDED, NodeState.DOWN),
        ("failing", AgentStep.RUNS, NodeState.UP),
        ("reboot_requested", AgentStep.RUNS, NodeState.UP),
        ("powered_down", AgentStep.ENDED, NodeState.DOWN),
        ("unknown", AgentStep.RUNS, NodeState.UNKNOWN),
        ("allocated*", AgentStep.RUNS, NodeState.UNKNOWN),
        ("allocated", AgentStep.ENDED, NodeState.DOWN),
        ("allocated", AgentStep.STARTING, NodeState.UNKNOWN),
        ("allocated", AgentStep.NEVER_STARTED, NodeState.UNKNOWN),
        ("", AgentStep.NEVER_STARTED, NodeState.UNKNOWN),
    ],
)
def test_a_node_is_what_slurm_and_its_step_say(
    state: str, agent: AgentStep, is_now: NodeState
) -> None:
    status = status_of(state, "", agent)
    assert status.state == is_now
    assert (status.reason == "") == (is_now == NodeState.UP)


def test_an_admins_drain_is_a_wish_and_no_failure() -> None:
    assert status_of("draining", "new DIMM", AgentStep.RUNS).draining == "new DIMM"
    assert status_of("failing", "fan 3", AgentStep.RUNS).draining == "fan 3"
    assert status_of("mixed", "new DIMM", AgentStep.RUNS).draining == ""


def test_slurms_reason_is_passed_on() -> None:
    assert status_of("down*", "Not responding", AgentStep.RUNS).reason == (
        "Slurm: down* (Not responding)"
    )


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("1-02:03:04", 93784.0),
        ("02:03:04", 7384.0),
        ("3:04", 184.0),
        ("0:00", 0.0),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("NOT_SET", None),
    ],
)
def test_a_time_is_read_as_slurm_writes_it(time: str, seconds: float | None) -> None:
    assert slurm_commands.seconds_of(time) == seconds


def test_nothing_of_a_job_is_inherited_but_where_slurm_is_configured() -> None:
    inherited = {
        "PATH": "/bin",
        "SLURM_CONF": "/etc/slurm/slurm.conf",
        "SLURM_NNODES": "1",
        "SLURMD_NODENAME": "n1",
        "SBATCH_ACCOUNT": "a",
        "SALLOC_PARTITION": "p",
    }
    assert slurm_commands.clean_environment(inherited) == {
        "PATH": "/bin",
        "SLURM_CONF": "/etc/slurm/slurm.conf",
    }


def test_two_runs_of_one_name_have_allocations_of_their_own(tmp_path: Path) -> None:
    first, second = (RunDirectory(tmp_path / folder / "night") for folder in ("a", "b"))
    assert allocation_name(first) != allocation_name(second)
    assert allocation_name(first).startswith("opt-train-night-")


def test_the_allocation_is_what_the_keys_say(tmp_path: Path) -> None:
    slurm = SlurmConfig(
        account="lab", partition="a100", constraint="a100&ib", options="--switches=1 --nice=10"
    )
    cluster = ClusterConfig(kind="slurm", nodes=2, buffer_nodes=2, slots_per_node=8, slurm=slurm)
    options = SlurmCluster(RunDirectory(tmp_path / "run"), cluster).allocation_options("2-4")
    assert {
        "--nodes=2-4",
        "--account=lab",
        "--partition=a100",
        "--constraint=a100&ib",
        "--gpus-per-node=8",
        "--switches=1",
        "--nice=10",
    } <= set(options)


def test_without_slurm_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = compose(["cluster=slurm", "model=tiny"])
    cluster = SlurmCluster(RunDirectory(tmp_path / "run"), config.cluster)
    with pytest.raises(BadInput, match="salloc, srun, squeue"):
        cluster.check_before_start(config)


def test_a_command_that_does_not_answer_is_slurms_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "squeue"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(slurm_commands.SlurmError, match=r"squeue has not answered for 0\.2 s"):
        slurm_commands.ask("squeue", seconds=0.2)


HOSTILE = [
    "name=a b",
    'data.corpus="x\'y"',
    "data.name=$(touch owned)",
    "x=`touch owned`",
    "y=a\nb",
]


def test_nothing_in_a_value_is_run_by_the_shell(tmp_path: Path) -> None:
    """The script, run by a real shell with a program in place of opt-train that prints what it is
    given."""
    program = tmp_path / "opt train"
    program.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    program.chmod(0o755)
    output = tmp_path / "$(touch owned)-%j.log"
    script = tmp_path / "script"
    script.write_text(supervisor_script(SlurmConfig(), "it's", output, str(program), HOSTILE))
    done = subprocess.run(
        ["bash", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.split("\0")[:-1] == ["run", "cluster=slurm", *HOSTILE]
    assert not list(tmp_path.rglob("owned"))


def test_the_script_has_the_sites_options_where_sbatch_reads_them() -> None:
    config = SlurmConfig(
        account="lab",
        partition="a100",
        supervisor_partition="cpu",
        time_limit="1-00:00:00",
        supervisor_time_limit="7-00:00:00",
        supervisor_options='--comment="the night run" --exclude=n9',
    )
    script = supervisor_script(config, "opt-train-night", Path("/runs/x.log"), "opt-train", ["a=1"])
    before, _, _ = script.partition("set -euo pipefail")
    directives = [
        shlex.split(line.removeprefix("#SBATCH "))[0]
        for line in before.splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert {
        "--job-name=opt-train-night",
        "--output=/runs/x.log",
        "--account=lab",
        "--partition=cpu",
        "--time=7-00:00:00",
        "--comment=the night run",
        "--exclude=n9",
        "--requeue",
        "--cpus-per-task=1",
    } <= set(directives)
    # sbatch reads no directive behind the first command.
    assert "#SBATCH" not in script.partition("set -euo pipefail")[2]


@pytest.mark.parametrize("value", ["two words", "--wrap=x", "a\nb"])
def test_a_value_that_slurm_would_take_for_something_else_is_refused(value: str) -> None:
    with pytest.raises(BadInput, match=r"cluster\.slurm\.partition"):
        compose([f'cluster.slurm.partition="{value}"'])


def test_dry_run_prints_the_script_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/bin")  # where no Slurm is
    words = ["submit", "--dry-run", "experiment=demo", "cluster=slurm", "name=night"]
    assert cli.main([*words, "cluster.slurm.account=lab"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --account=lab\n" in script
    assert "set -- experiment=demo name=night cluster.slurm.account=lab\n" in script
    assert list(tmp_path.iterdir()) == []
