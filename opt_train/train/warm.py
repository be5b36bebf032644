"""The warm rank: a process that has imported what a rank imports, and waits to be one, once.

The node's fork server imports (`import_everything`), and each process that it forks runs `main`.
Started by itself, as `python -m opt_train.train.warm --facts-fd N --control-fd M`, it does both.
"""

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback

_PR_SET_PDEATHSIG = 1
_FAILED = 1


def main() -> None:
    """Never returns: the process ends without running any library's exit handlers, which could wait
    for dead peers."""
    parser = argparse.ArgumentParser(description="A warm rank: started by an agent, not by people.")
    parser.add_argument("--facts-fd", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    arguments = parser.parse_args()
    die_with_the_agent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    # Ctrl-C goes to the whole terminal group; what to do about it is the supervisor's decision
    # alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        # Both are text files here.
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code = _FAILED
    try:
        code = be_warm(arguments.facts_fd, arguments.control_fd)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def be_warm(facts_fd: int, control_fd: int) -> int:
    """Import, publish `Warm`, wait for `Begin`, be that rank; returns the exit code."""
    began = time.monotonic()
    # These two need no torch, and the handlers must stand before a stray SIGTERM comes.
    from opt_train.train.fact_pipe import FactPipe  # noqa: PLC0415
    from opt_train.train.orders import AgentGone, ControlPipe, StopSignals  # noqa: PLC0415

    signals = StopSignals()
    signals.listen()
    pipe, control = FactPipe(facts_fd), ControlPipe(control_fd)
    import_everything()
    from opt_train.protocol.facts import Warm  # noqa: PLC0415
    from opt_train.train import rank  # noqa: PLC0415

    first_fused_step()
    pipe.publish(Warm(os.getpid(), round(time.monotonic() - began, 3)))
    begin = control.wait_for_begin()
    if begin is None:
        return 0
    signals.received = ""  # what came before the rank had anything to save asks for nothing
    # The threads wait in C++ for peers that may be gone: faulthandler and SIGKILL reach them,
    # exceptions do not.
    try:
        code = rank.run_rank(begin, pipe.publish, control, signals)
    except AgentGone:
        print("the agent is gone, and this rank with it", flush=True)
        return _FAILED
    pipe.close()
    return code


def die_with_the_agent() -> None:
    """Ask the kernel for SIGKILL when the thread that started this process ends, however that comes
    about."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(_FAILED)


def import_everything() -> None:
    """Import torch and what it otherwise imports at the first step: together most of a restart.
    Computes nothing, and leaves one thread: processes are forked afterwards."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    import torch._dynamo  # noqa: PLC0415
    import torch.distributed.checkpoint.hf_storage  # noqa: PLC0415
    import torch.distributed.fsdp  # noqa: PLC0415
    import torch.distributed.tensor  # noqa: PLC0415

    import opt_train.train.rank  # noqa: F401, PLC0415


def first_fused_step() -> None:
    """Take one step of two weights, which imports a share of its own. It asks for a GPU, where
    torch knows of such: no process may be forked after that."""
    import torch  # noqa: PLC0415

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.zeros(2)
    torch.optim.AdamW([weight], fused=True).step()


if __name__ == "__main__":
    main()
