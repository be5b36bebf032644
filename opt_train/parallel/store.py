"""The rendezvous store of a set of ranks, bound no wider than it must be."""

import socket
from datetime import timedelta

# torch.distributed re-exports it, but not to type checkers.
from torch._C._distributed_c10d import TCPStore


def bind_store(host: str, timeout: timedelta) -> TCPStore:
    """A store that this process serves on a free port of the address `host`, and no other."""
    # torch would listen on every interface; whoever reaches the store can put keys into it.
    listening = socket.create_server((host, 0))
    return TCPStore(
        host,
        listening.getsockname()[1],
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def reach_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """The store that another process serves there."""
    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
