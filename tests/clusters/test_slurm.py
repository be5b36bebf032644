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
from opt_train.clusters.slurm import AgentStep, SlurmCluster, status_of
from opt_train.clusters.slurm_allocation import (
    AGENT_STEP,
    SlurmAllocation,
    allocation_name,
    launch_directory,
    supervisor_name,
)
from opt_train.clusters.slurm_submission import SlurmSubmission, filled_script
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
    options = SlurmAllocation(RunDirectory(tmp_path / "run"), cluster).command("a", "2-4")
    assert options[:3] == ["salloc", "--no-shell", "--no-kill"]
    assert {
        "--nodes=2-4",
        "--account=lab",
        "--partition=a100",
        "--constraint=a100&ib",
        "--gpus-per-node=8",
        "--switches=1",
        "--nice=10",
    } <= set(options)


NODES = """\
n1|idle
n2|mixed
n3|allocated
n4|idle*
n5|drained
n6|down*
n7|completing
"""
"""Four of them work."""


@pytest.mark.parametrize(
    ("nodes", "buffer_nodes", "failed", "spared"),
    [
        (1, 0, (), ["n3", "n1"]),
        # n5 is drained: Slurm gives it to nobody anyhow.
        (2, 1, (), ["n3"]),
        (2, 2, (), []),
        (2, 1, ("n2",), []),
        (9, 9, (), []),
    ],
)
def test_repeat_offenders_are_left_out_as_long_as_enough_others_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nodes: int,
    buffer_nodes: int,
    failed: tuple[str, ...],
    spared: list[str],
) -> None:
    """A run that waits for nodes that are not there is worse than one that trains on bad ones."""
    asked: list[tuple[str, ...]] = []

    def answer(*command: str) -> str:
        asked.append(command)
        return NODES

    monkeypatch.setattr(slurm_commands, "ask", answer)
    config = ClusterConfig(
        kind="slurm", nodes=nodes, buffer_nodes=buffer_nodes, slurm=SlurmConfig(partition="a100")
    )
    allocation = SlurmAllocation(RunDirectory(tmp_path / "run"), config)
    allocation.avoided = ("n3", "n5", "n1")
    assert allocation.spared(failed) == spared
    assert "--partition=a100" in asked[0]
    allocation.avoided = ()
    assert allocation.spared(failed) == []
    assert len(asked) == 1, "without an offender nobody is asked"


def test_repeat_offenders_are_not_added_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four nodes that work, the run has one, one has failed, and one has often."""
    monkeypatch.setattr(slurm_commands, "ask", lambda *_: NODES)
    monkeypatch.setattr(slurm_commands, "living_jobs", lambda *_: [])
    monkeypatch.setattr(slurm_commands, "all_nodes", lambda: {"n1", "n2", "n3", "n4", "n5"})
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: asked.append(command))
    config = ClusterConfig(kind="slurm", slurm=SlurmConfig(partition="a100"))
    allocation = SlurmAllocation(RunDirectory(tmp_path / "run"), config)
    allocation.nodes_of = {"7": ("n1",)}
    allocation.avoided = ("n3",)
    allocation.request(1, ["n2"])
    assert "--exclude=n2,n3" in asked[0]
    allocation.request(2, ["n2"])
    assert "--exclude=n2" in asked[1], "too few without it"


def test_a_step_in_an_allocation_that_the_node_has_left_is_no_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a node that lost power Slurm shows the step on and on, and an agent is needed there once
    the node is back in another allocation."""
    monkeypatch.setattr(
        slurm_commands, "ask", lambda *_: f"7.1|{AGENT_STEP}|n1\n7.2|{AGENT_STEP}|n2\n"
    )
    cluster = SlurmCluster(RunDirectory(tmp_path / "run"), ClusterConfig(kind="slurm"))
    cluster._allocation.nodes_of = {"7": ("n1", "n2"), "9": ("n1",)}
    assert cluster._agent_steps() == {"n2": ["7.2"]}


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


@pytest.mark.parametrize("template", ["supervisor.sbatch", "inside.sbatch"])
def test_nothing_in_a_value_is_run_by_the_shell(template: str, tmp_path: Path) -> None:
    """The script, run by a real shell with a program in place of opt-train that prints what it is
    given."""
    program = tmp_path / "opt train"
    program.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    program.chmod(0o755)
    output = tmp_path / "$(touch owned)-%j.log"
    script = tmp_path / "script"
    options = {"job-name": "it's", "output": str(output)}
    script.write_text(filled_script(template, options, ["--x=a b"], str(program), HOSTILE))
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
    cluster = ClusterConfig(kind="slurm", slurm=config)
    run = RunDirectory(Path("/runs/night"))
    script = SlurmSubmission(run, cluster).script("opt-train", ["a=1"])
    before, _, _ = script.partition("set -euo pipefail")
    directives = [
        shlex.split(line.removeprefix("#SBATCH "))[0]
        for line in before.splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert {
        f"--job-name={supervisor_name(run)}",
        "--output=/runs/night/submit/supervisor-%j.log",
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


def directives(script: str) -> list[str]:
    """What sbatch reads in front of the first command."""
    before, _, behind = script.partition("set -euo pipefail")
    assert "#SBATCH" not in behind
    lines = [line for line in before.splitlines() if line.startswith("#SBATCH ")]
    return [shlex.split(line.removeprefix("#SBATCH "))[0] for line in lines]


def test_inside_the_script_asks_for_the_nodes_itself(tmp_path: Path) -> None:
    slurm = SlurmConfig(
        holder="inside",
        account="lab",
        partition="a100",
        time_limit="1-00:00:00",
        gpu_option="--gres=gpu:a100:{slots}",
        options="--switches=1",
        supervisor_partition="cpu",
    )
    cluster = ClusterConfig(kind="slurm", nodes=4, buffer_nodes=1, slots_per_node=8, slurm=slurm)
    run = RunDirectory(tmp_path / "night")
    asked = directives(SlurmSubmission(run, cluster).script("opt-train", ["a=1"]))
    assert {
        f"--job-name={allocation_name(run)}",
        "--nodes=4-5",
        "--gres=gpu:a100:8",
        "--partition=a100",
        "--time=1-00:00:00",
        "--switches=1",
        "--no-kill",
        "--requeue",
        "--exclusive",
        "--mem=0",
    } <= set(asked)
    # The site's own way to ask for GPUs, and the nodes' partition.
    assert not [word for word in asked if word.startswith("--gpus-per-node") or "cpu" in word]


def test_a_holder_job_is_asked_for_as_salloc_would_and_never_queued_again(tmp_path: Path) -> None:
    slurm = SlurmConfig(holder="job", account="lab")
    cluster = ClusterConfig(kind="slurm", nodes=2, slots_per_node=8, slurm=slurm)
    words = SlurmAllocation(RunDirectory(tmp_path / "run"), cluster).command("a", "2")
    assert words[0] == "sbatch"
    expected = {"--no-requeue", "--no-kill", "--job-name=a", "--nodes=2", "--account=lab"}
    assert expected <= set(words)


def test_inside_and_outside_the_supervisor_is_begun_by_the_same_lines() -> None:
    bodies = [
        (launch_directory() / name).read_text().partition("set -euo pipefail")[2]
        for name in ("supervisor.sbatch", "inside.sbatch")
    ]
    assert bodies[0] == bodies[1] != ""


def test_inside_needs_a_job_to_be_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    cluster = ClusterConfig(kind="slurm", slurm=SlurmConfig(holder="inside"))
    allocation = SlurmAllocation(RunDirectory(tmp_path / "run"), cluster)
    with pytest.raises(BadInput, match=r"holder=inside takes the nodes of the job"):
        allocation.acquire((), print, lambda: False)


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
