"""What `tests.slurm.chaos` does to a run on a real Slurm, and what must come of each fault."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opt_logbook.record.events import Entry

from opt_train.run.fold import fold
from opt_train.run.state import RunState
from tests.end_to_end import driving
from tests.slurm import fake_nvml
from tests.slurm.site import Site, supervisors

NODES, EVERY_STEPS = 4, 10
SLURM_PATIENCE_SECONDS = 10
RECOVERY_SECONDS = 120.0


class ChaosError(AssertionError):
    """The run did not do what it should; the message says after which fault."""


class Chaos:
    """The run, and what breaks it."""

    def __init__(self, site: Site, orders: Path, shared: Path, seed: int) -> None:
        self.site, self.run, self.slurm = site, site.run, site.slurm
        self.orders, self.shared = orders, shared
        self.random = random.Random(seed)
        self.broken: set[str] = set()
        """Nodes that the chronicle must tell of."""

    def entries(self, kind: str, since: int = 0) -> list[Entry]:
        return [entry for entry in driving.of_kind(self.run, kind) if entry.seq > since]

    def last_seq(self) -> int:
        return max((entry.seq for entry in driving.entries(self.run)), default=0)

    def nodes(self) -> tuple[str, ...]:
        """In the order of their ranks."""
        return tuple(self.entries("attempt_started")[-1].event.nodes)

    def order(self, rank: int, what: str) -> None:
        (self.orders / f"rank{rank}.{what}").touch()

    def rank(self) -> int:
        return self.random.randrange(NODES)

    def other_node(self) -> str:
        """One that trains, without rank 0."""
        return self.random.choice(self.nodes()[1:])

    def newest_save(self) -> Path:
        return self.run.path / self.entries("checkpoint_committed")[-1].event.path

    def step(self) -> int:
        return driving.newest_step(self.run)

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = RECOVERY_SECONDS):
        """Raises ChaosError: `what` has not come about."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise ChaosError(f"{what} has not come about in {seconds:g} s\n{self.described()}")
            time.sleep(0.2)

    def described(self) -> str:
        logs = [*self.run.submit.glob("*.log"), *self.run.nodes.glob("*/agent.log")]
        ends = (f"{log}:\n{log.read_text(errors='replace')[-2500:]}" for log in logs)
        story = "\n".join(f"{e.seq} {e.step} {e.event}" for e in driving.entries(self.run)[-25:])
        return "\n".join((self.site.state(), *ends, story))

    def trains(self) -> bool:
        started = self.entries("attempt_started")
        return bool(started and self.entries("training_began", started[-1].seq))

    def spares(self) -> list[str]:
        """The nodes that stand by."""
        state = RunState()
        for entry in driving.entries(self.run):
            state = fold(state, entry)
        return [name for name, node in state.nodes.items() if node.role == "buffer"]

    def wait_for_training(self) -> None:
        """It trains, and has saved since the last fault."""
        self.wait(self.trains, "training")
        saved, step = len(self.entries("checkpoint_committed")), self.step()
        self.wait(
            lambda: len(self.entries("checkpoint_committed")) > saved and self.step() > step,
            "a checkpoint",
        )


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. `inject` returns what the journal must say, as a sentence and a
    condition of the entries since."""

    name: str
    inject: Callable[[Chaos], "Expected"]
    takes_a_node: bool = False


@dataclass(frozen=True)
class Expected:
    """What must come of a fault."""

    what: str
    holds: Callable[[], bool]
    heal: Callable[[], None] = lambda: None


def diagnosed(chaos: Chaos, cause: str, node: str = "", detail: str = "") -> Expected:
    """An incident of this cause, and training again."""
    since = chaos.last_seq()

    def holds() -> bool:
        found = [entry.event for entry in chaos.entries("incident_diagnosed", since)]
        named = [d for d in found if d.cause == cause and detail in d.detail and node in d.node]
        return bool(named) and bool(chaos.entries("training_began", since))

    return Expected(f"an incident by {cause} {detail} {node}".strip(), holds)


def trains_on(chaos: Chaos, steps: int = 15) -> Expected:
    """No attempt ends, and no failure is seen."""
    since, step = chaos.last_seq(), chaos.step()

    def holds() -> bool:
        seen = chaos.entries("failure_seen", since)
        if seen:
            raise ChaosError(f"a failure was seen where there was none: {seen[0].event}")
        return chaos.step() >= step + steps

    return Expected("training that goes on", holds)


# Ranks --------------------------------------------------------------------------------------------


def kill_a_rank(chaos: Chaos) -> Expected:
    expected = diagnosed(chaos, "killed")
    chaos.order(chaos.rank(), "SIGKILL")
    return expected


def stop_a_rank(chaos: Chaos) -> Expected:
    expected = diagnosed(chaos, "hang")
    chaos.order(chaos.rank(), "SIGSTOP")
    return expected


def raise_an_exception(chaos: Chaos) -> Expected:
    expected = diagnosed(chaos, "user_code")
    chaos.order(chaos.rank(), "exception")
    return expected


# Nodes --------------------------------------------------------------------------------------------


def cut_the_power(chaos: Chaos, node: str) -> Expected:
    expected = diagnosed(chaos, "node_failure", node)
    chaos.slurm.kill_node(node)
    chaos.broken.add(node)
    return Expected(expected.what, expected.holds, lambda: chaos.slurm.boot_node(node))


def cut_the_power_of_a_node(chaos: Chaos) -> Expected:
    return cut_the_power(chaos, chaos.other_node())


def cut_the_power_of_rank_0(chaos: Chaos) -> Expected:
    return cut_the_power(chaos, chaos.nodes()[0])


def cut_the_network_for_a_moment(chaos: Chaos) -> Expected:
    """Shorter than Slurm's patience, and than the run's own."""
    node = chaos.random.choice(chaos.nodes())
    chaos.slurm.cut_node(node)
    time.sleep(2.0)
    chaos.slurm.plug_node(node)
    return trains_on(chaos)


def cut_the_network_for_long(chaos: Chaos) -> Expected:
    node = chaos.other_node()
    expected = diagnosed(chaos, "node_failure", node)
    chaos.slurm.cut_node(node)
    chaos.broken.add(node)
    time.sleep(2.5 * SLURM_PATIENCE_SECONDS)
    return Expected(expected.what, expected.holds, lambda: chaos.slurm.plug_node(node))


def report_an_ecc_error(chaos: Chaos) -> Expected:
    """The GPU's counter goes up before any rank dies of it. Nobody heals it: an admin must."""
    node, since = chaos.random.choice(chaos.nodes()), chaos.last_seq()
    recovered = diagnosed(chaos, "gpu_ecc", node, "uncontained")
    fake_nvml.set_values(chaos.slurm.disk(node), node, count=1, gpu0_ecc=1)
    chaos.broken.add(node)

    def holds() -> bool:
        seen = chaos.entries("failure_seen", since)
        if seen and seen[0].event.sign != "finding":
            raise ChaosError(f"a rank died before the counter was read: {seen[0].event}")
        return recovered.holds()

    return Expected(recovered.what, holds)


# The shared file system ---------------------------------------------------------------------------


def corrupt_the_newest_checkpoint(chaos: Chaos) -> Expected:
    """A bit of it flips, and then a rank dies."""
    since, save = chaos.last_seq(), chaos.newest_save()
    shard = chaos.random.choice(sorted(save.glob("*.safetensors")))
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    recovered = kill_a_rank(chaos)

    def holds() -> bool:
        rejected = [e.event.path for e in chaos.entries("checkpoint_rejected", since)]
        return any(save.match(path) for path in rejected) and recovered.holds()

    return Expected(f"{save.name} is rejected", holds)


def fill_the_file_system(chaos: Chaos) -> Expected:
    ballast = chaos.shared / "ballast"
    with contextlib.suppress(subprocess.CalledProcessError):
        free = shutil.disk_usage(chaos.shared).free
        subprocess.run(["fallocate", "-l", str(free), ballast], check=True, capture_output=True)
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    since = chaos.last_seq()
    time.sleep(12.0)
    ballast.unlink()

    def holds() -> bool:
        named = [
            e for kind in ("save_abandoned", "journal_stalled") for e in chaos.entries(kind, since)
        ]
        found = [e.event.cause for e in chaos.entries("incident_diagnosed", since)]
        saved = chaos.entries("checkpoint_committed", since)
        return bool(named or "storage" in found) and bool(saved)

    return Expected("a full file system on record", holds)


def stall_the_file_system(chaos: Chaos) -> Expected:
    """Every write waits, as on a server that fails over. It is thawed by a process of its own, so
    that nothing stays frozen should this one die."""
    # Just before a save, which is to be in the middle of it.
    chaos.wait(lambda: chaos.step() % EVERY_STEPS in (7, 8), "the steps before a save")
    since = chaos.last_seq()
    program = 'fsfreeze -f "$0" && sleep 12; fsfreeze -u "$0"'
    subprocess.run(["setsid", "sh", "-c", program, chaos.shared], check=True)

    def holds() -> bool:
        # What waits first is a save or a line of the journal, as the moment wills.
        saves = [e.event.seconds for e in chaos.entries("checkpoint_committed", since)]
        return bool(chaos.entries("journal_stalled", since)) or max(saves, default=0.0) > 5.0

    return Expected("a stall on record", holds)


# Supervisor and scheduler -------------------------------------------------------------------------


def kill_the_supervisor(chaos: Chaos) -> Expected:
    adopted = len(chaos.entries("agents_adopted"))
    [pid] = supervisors(chaos.site)
    on = trains_on(chaos)
    os.kill(pid, signal.SIGKILL)
    return Expected(
        "the agents adopted by another supervisor",
        lambda: on.holds() and len(chaos.entries("agents_adopted")) > adopted,
    )


def restart_slurmctld(chaos: Chaos) -> Expected:
    chaos.slurm.restart_controller(seconds=6.0)
    return trains_on(chaos)


def bring_the_time_limit_near(chaos: Chaos) -> Expected:
    since = chaos.last_seq()
    # The first is the run's; behind it may be one that brought back nodes that were healed.
    job = min(chaos.site.allocations(running=True), key=int)
    run_time = chaos.slurm.job(job)["RunTime"].split(":")
    minutes = int(run_time[-3]) * 60 + int(run_time[-2])
    limit = ("scontrol", "update", f"jobid={job}", f"timelimit={minutes + 2}")

    def is_set() -> bool:
        # Slurm refuses for a moment after it has changed something of the job itself.
        with contextlib.suppress(AssertionError):
            chaos.slurm.run(*limit)
            return True
        return False

    chaos.wait(is_set, "the time limit", 30.0)

    def holds() -> bool:
        stops = [e.event for e in chaos.entries("run_stopped", since)]
        started = chaos.entries("attempt_started", since)
        if chaos.entries("failure_seen", since):
            raise ChaosError("a failure was seen where the run was to stop as planned")
        if started and stops and started[0].step != stops[0].saved_step:
            raise ChaosError(f"steps were lost: {stops[0].saved_step} -> {started[0].step}")
        return bool(stops) and bool(chaos.entries("training_began", since))

    return Expected("a planned stop and other nodes", holds)


FAULTS = (
    Fault("a rank is killed", kill_a_rank),
    Fault("a rank is stopped", stop_a_rank),
    Fault("a rank raises an exception", raise_an_exception),
    Fault("a node loses power", cut_the_power_of_a_node, takes_a_node=True),
    Fault("rank 0's node loses power", cut_the_power_of_rank_0, takes_a_node=True),
    Fault("a node is cut off for a moment", cut_the_network_for_a_moment),
    Fault(
        "a node is cut off for longer than Slurm waits", cut_the_network_for_long, takes_a_node=True
    ),
    Fault("a GPU reports an ECC error", report_an_ecc_error, takes_a_node=True),
    Fault("the newest checkpoint is corrupt", corrupt_the_newest_checkpoint),
    Fault("the file system is full", fill_the_file_system),
    Fault("the file system stalls", stall_the_file_system),
    Fault("the supervisor is killed", kill_the_supervisor),
    Fault("slurmctld is restarted", restart_slurmctld),
    Fault("the time limit comes near", bring_the_time_limit_near),
)
