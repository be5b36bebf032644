"""``python -m opt_train.burn_in.host_powers --folder DIR``: what this host grants the user who
starts it, printed as one line of JSON; `folder` is where run directories lie.

Each question is answered by trying what opt_train would do, or would need, and nothing else.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import sys
from dataclasses import asdict
from pathlib import Path

from opt_train.burn_in.site_power import Granted, SitePower
from opt_train.burn_in.verdict import in_words
from opt_train.host import signals
from opt_train.host.children import run_within

ANSWER_SECONDS = 20.0
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
KERNEL_LOGS = ("/var/log/kern.log", "/var/log/syslog", "/var/log/messages")
PROBE_GPUS = """\
import pynvml as nvml
nvml.nvmlInit()
count = nvml.nvmlDeviceGetCount()
events = nvml.nvmlEventSetCreate()
for index in range(count):
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
print(count)
"""


def main(arguments: list[str]) -> int:
    """Print every power of this host."""
    signals.ignore()
    parser = argparse.ArgumentParser(prog="python -m opt_train.burn_in.host_powers")
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args(arguments)
    powers = [kernel_log(), gpus(), stacks(), locked_memory(), space(given.folder)]
    print(json.dumps([asdict(power) for power in [*powers, quota(given.folder)]]))
    return 0


def powers_in(output: str) -> list[SitePower]:
    """What `main` printed.

    Raises:
        ValueError: it printed something else.
    """
    try:
        [*_, line] = output.strip().splitlines()
        return [
            SitePower(**{**fields, "granted": Granted(fields["granted"])})
            for fields in json.loads(line)
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"no answer: {error}") from None


def kernel_log() -> SitePower:
    """Whether messages of the kernel can be read, by any of the three ways there are."""
    ways = {
        "/dev/kmsg": _reads_kmsg(),
        "journalctl -k": _reads_journal(),
        **{path: os.access(path, os.R_OK) for path in KERNEL_LOGS},
    }
    open_ways = [name for name, works in ways.items() if works]
    then = "GPU errors are read by NVML; what the kernel wrote of them is for whoever looks"
    if open_ways:
        return _power("read the kernel log", Granted.YES, ", ".join(open_ways), then)
    return _power("read the kernel log", Granted.NO, f"none of {', '.join(ways)}", then)


def _reads_kmsg() -> bool:
    try:
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return bool(os.read(descriptor, 8192))
    except BlockingIOError:  # open to us, and empty
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _reads_journal() -> bool:
    if shutil.which("journalctl") is None:
        return False
    # One line: a long log must not cost the answer its time.
    end = run_within(ANSWER_SECONDS, ["journalctl", "-k", "-n", "1", "-q", "--no-pager"])
    # To whom it is closed it shows nothing, with exit code 0.
    return end.code == 0 and bool(end.output.strip())


def gpus() -> SitePower:
    """Whether NVML loads and takes a subscription of events, in a child: it may hang."""
    end = run_within(ANSWER_SECONDS, [sys.executable, "-P", "-c", PROBE_GPUS])
    power, then = "NVML with events", "ECC errors, Xids and lost GPUs are seen before a rank dies"
    blind = "GPUs are not watched: a failing one is known by the rank that dies of it"
    if end.code is None:
        found = f"NVML has not answered within {ANSWER_SECONDS:g} s"
        return _power(power, Granted.UNKNOWN, found, blind)
    if end.code != 0:
        return _power(power, Granted.NO, end.last_words or f"exit code {end.code}", blind)
    count = end.output.strip()
    if count == "0":
        return _power(power, Granted.NO, "NVML shows no GPU", blind)
    return _power(power, Granted.YES, f"{count} GPUs, Xid events registered", then)


def stacks() -> SitePower:
    """Whether a debugger may look at a process that it did not start (yama)."""
    then = "stacks come from the ranks themselves (SIGUSR2, faulthandler), which needs no ptrace"
    try:
        scope = PTRACE_SCOPE.read_text().strip()
    except FileNotFoundError:
        return _power("ptrace", Granted.YES, f"{PTRACE_SCOPE} is not there: no yama", then)
    except OSError as error:
        return _power("ptrace", Granted.UNKNOWN, f"{PTRACE_SCOPE}: {error.strerror}", then)
    granted = Granted.YES if scope == "0" else Granted.NO
    return _power("ptrace", granted, f"{PTRACE_SCOPE} says {scope}", then)


def locked_memory() -> SitePower:
    """Whether memory may be pinned without limit, which InfiniBand wants."""
    # The soft limit: what a process has that does nothing about it.
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    then = "NCCL goes over InfiniBand where there is one"
    if limit == resource.RLIM_INFINITY:
        return _power("lock memory", Granted.YES, "ulimit -l is unlimited", then)
    found = f"ulimit -l is {limit // 1024} KiB"
    return _power("lock memory", Granted.NO, found, "NCCL may fall back to sockets, or fail")


def space(folder: Path) -> SitePower:
    """How much room there is for run directories."""
    above = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(above).free
    writable = os.access(above, os.W_OK | os.X_OK)
    then = "a run whose checkpoints do not fit is refused at its start"
    found = f"{above}: {in_words(float(free), 'B/s').removesuffix('/s')} free"
    if not writable:
        return _power("write run directories", Granted.NO, f"{above} cannot be written to", then)
    return _power("write run directories", Granted.YES, found, then)


def quota(folder: Path) -> SitePower:
    """Whether a quota holds where run directories lie, as far as a program says."""
    power = "free of a quota"
    then = "a full quota is a full disk: training goes on, and decisions wait for space"
    # Lustre's own command first: the other one knows nothing of it, and shows other disks.
    asked = [["lfs", "quota", "-q", str(folder)], ["quota", "--no-wrap"]]
    for command in (words for words in asked if shutil.which(words[0])):
        end = run_within(ANSWER_SECONDS, command)
        lines = [line for line in end.output.splitlines() if line.strip()]
        if end.code == 0 and lines:
            return _power(power, Granted.NO, f"{' '.join(command)}: {lines[-1].strip()}", then)
        if end.code == 0:
            return _power(power, Granted.YES, f"{' '.join(command)} shows none", then)
    return _power(power, Granted.UNKNOWN, "neither `lfs quota` nor `quota` answers", then)


def _power(power: str, granted: Granted, found: str, then: str) -> SitePower:
    return SitePower(power, granted, f"{found} (on {socket.gethostname()})", then)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
