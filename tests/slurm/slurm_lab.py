"""A real Slurm of a few nodes on this machine, inside namespaces: nothing of the machine's own is
touched.

Each host (the controller, which is the login node too, and the nodes `n1` to `nN`) is a set of
network, host name, mount and process namespaces; `slurm_lab.sh` is what runs inside. Ending the one
process that was started from here ends everything: the kernel kills a process namespace with its
first process, and that one dies with its starter.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = (
    *("slurmctld", "slurmd", "sbatch", "munged", "ip", "gcc"),
    *("unshare", "nsenter", "setpriv"),
)
PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2 gcc libc6-dev"
SCRIPT = Path(__file__).with_name("slurm_lab.sh")
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
START_SECONDS = 90.0

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=controller(10.77.0.254)
SlurmUser=root
AuthType=auth/munge
# Also the time that a job which was queued again waits; 120 s by default.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n.spool
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
PropagateResourceLimits=NONE
# Believe CPUs= below, whatever the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-{nodes}] NodeAddr=10.77.0.[1-{nodes}] CPUs={cpus} RealMemory=4000 {gres}State=UNKNOWN
PartitionName=main Nodes=n[1-{main}] Default=YES MaxTime=INFINITE State=UP
{topology}{service}"""


def missing() -> str:
    """Why there can be no Slurm here; empty where there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"Slurm's tests need {', '.join(absent)}: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "Slurm's tests need root, for namespaces of their own"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True, check=False
    )
    return (
        ""
        if tried.returncode == 0
        else f"Slurm's tests need namespaces: {tried.stderr.decode().strip()}"
    )


class SlurmLab:
    """Use as ``with SlurmLab(folder, nodes=1) as slurm:``; `folder` takes its configuration, state
    and logs."""

    def __init__(
        self,
        folder: Path,
        nodes: int,
        *,
        service_nodes: int = 0,
        gpus: int = 0,
        cpus: int = 2,
        kill_wait: int = 120,
        slurmd_timeout: int = 10,
        topology: str = "",
    ) -> None:
        """Nodes ``n1`` to ``nN`` of the partition ``main``, and behind them `service_nodes` of the
        partition ``service``, for jobs of one CPU.

        `gpus` are what Slurm believes a node to have; `slurmd_timeout` is after how many seconds of
        silence Slurm calls a node down. `topology` are lines of a topology.conf, of a tree.
        """
        self.folder = folder
        self._nodes = nodes + service_nodes
        self._gpus = gpus
        self._topology = topology
        self._values = {
            "kill_wait": kill_wait,
            "slurmd_timeout": slurmd_timeout,
            "cpus": cpus,
            "main": nodes,
            "service": f"PartitionName=service Nodes=n[{nodes + 1}-{self._nodes}] State=UP\n"
            if service_nodes
            else "",
            "topology": "TopologyPlugin=topology/tree\n" if topology else "",
            "gres": f"Gres=gpu:{gpus} " if gpus else "",
        }
        self._environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))
        } | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def __enter__(self) -> "SlurmLab":
        names = [f"n{number}" for number in range(1, self._nodes + 1)]
        for part in ("state", *(f"{n}.{use}" for n in names for use in ("spool", "disk"))):
            (self.folder / part).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(folder=self.folder, nodes=self._nodes, **self._values)
        )
        if self._topology:
            (self.folder / "topology.conf").write_text(self._topology)
        for number in range(self._gpus):
            (self.folder / f"nvidia{number}").touch()
        if self._gpus:
            devices = f"{self.folder}/nvidia[0-{self._gpus - 1}]"
            (self.folder / "gres.conf").write_text(f"Name=gpu File={devices}\n")
        # Without this slurmd wants systemd, to make itself a control group of version 2.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        hosts = [f"10.77.0.{number} n{number}" for number in range(1, self._nodes + 1)]
        (self.folder / "hosts").write_text(
            "\n".join(["127.0.0.1 localhost", "10.77.0.254 controller", *hosts, ""])
        )
        # Should the tests be killed, Slurm dies too.
        starter = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            *NAMESPACES,
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        with (self.folder / "controller.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*starter, str(SCRIPT), "controller", str(self.folder), str(self._nodes)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        try:
            self._wait_until_idle()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def run(
        self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None
    ) -> str:
        """Standard output of `command`, which must not fail, on the login node."""
        inside = [
            "nsenter",
            "-t",
            str(self._first()),
            *NAMESPACES,
            f"--wdns={cwd or self.folder}",
            "--",
            *command,
        ]
        done = subprocess.run(
            inside,
            capture_output=True,
            text=True,
            check=False,
            env=self._environment | (environment or {}),
        )
        assert done.returncode == 0, (
            f"{' '.join(command)} ended with {done.returncode}: {done.stderr}"
        )
        return done.stdout.strip()

    # Faults ---------------------------------------------------------------------------------------

    def disk(self, node: str) -> Path:
        """What the node sees as /mnt."""
        return self.folder / f"{node}.disk"

    def kill_node(self, node: str) -> None:
        """Cut the node's power: its peers hear nothing any more."""
        self.run("ip", "link", "set", f"to-{node}", "down")
        self.run("kill", "-KILL", (self.folder / f"{node}.pid").read_text().strip())

    def cut_node(self, node: str) -> None:
        """Pull the node's network cable; its processes go on."""
        self.run("ip", "link", "set", f"to-{node}", "down")

    def plug_node(self, node: str) -> None:
        """Put the network cable back."""
        self.run("ip", "link", "set", f"to-{node}", "up")

    def boot_node(self, node: str) -> None:
        """Start a killed node again."""
        self.run(str(SCRIPT), "boot", str(self.folder), node, f"10.77.0.{node.removeprefix('n')}")

    def restart_controller(self, seconds: float) -> None:
        """End slurmctld, and start it again after so many seconds."""
        self.run(
            *("sh", "-c", 'kill "$(cat /run/slurmctld.pid)"; sleep "$0"; slurmctld', str(seconds))
        )

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, as JobState=COMPLETED, Restarts=1, ExitCode=0:0 and so
        on."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def said(self) -> str:
        """The ends of the daemons' logs, for a failed test."""
        return "\n".join(
            f"{log.name}:\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log"))
        )

    def _first(self) -> int:
        """PID 1 of the login node, as this process sees it."""
        children = (
            Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        )
        return int(children[0])

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        idle = ""
        while idle != str(self._nodes):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"Slurm did not come up:\n{self.said()}")
            time.sleep(0.1)
            try:
                idle = self.run("sinfo", "--noheader", "--states=idle", "--format=%D")
            except (AssertionError, OSError, IndexError):
                continue

    def _end(self) -> None:
        # The first process inside, not its starter: that one then reaps it, and returns when all is
        # over.
        with contextlib.suppress(OSError, IndexError):
            os.kill(self._first(), signal.SIGKILL)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
