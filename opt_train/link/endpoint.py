"""Where a process of the run listens: a Unix socket in a private folder, or one TCP address.

Both carry the same handshake and the same lines. A Unix socket serves where every node is this
machine: nobody but this user can even connect. TCP serves where nodes are machines; whoever reaches
the address may connect, so it is one address and never all of a host's interfaces (invariant 13).
"""

import asyncio
import ipaddress
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "opt-train-"
_SOCKET = "supervisor.sock"
_MAX_PATH_BYTES = 107
"""sun_path holds 108 bytes with its final zero; a run directory may lie deeper than that."""
STREAM_LIMIT_BYTES = 1 << 16

Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    """A Unix socket's absolute path."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpEndpoint:
    """An IPv4 address, as digits: a name would have to be looked up, which may block for long.
    Port 0, to listen at: a free one."""

    host: str
    port: int = 0

    def __str__(self) -> str:
        return f"tcp:{self.host}:{self.port}"


Endpoint = UnixEndpoint | TcpEndpoint


def parse_endpoint(text: str) -> Endpoint:
    """The endpoint that was published as `text`.

    Raises:
        ValueError: it is none that could be dialled.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "unix":
        if not rest.startswith("/") or "\0" in rest or len(os.fsencode(rest)) > _MAX_PATH_BYTES:
            raise ValueError(f"{rest!r} is no path of a Unix socket")
        return UnixEndpoint(Path(rest))
    if scheme == "tcp":
        return parse_host_and_port(rest)
    raise ValueError(f"{scheme!r} is no transport")


def parse_host_and_port(text: str) -> TcpEndpoint:
    """The endpoint of ``host:port``. Raises ValueError: it is none that could be dialled."""
    host, _, port = text.rpartition(":")
    address = ipaddress.IPv4Address(host)
    if address.is_unspecified or not port.isascii() or not port.isdigit():
        raise ValueError(f"{text!r} is no address and port")
    if not 0 < int(port) < 1 << 16:
        raise ValueError(f"{port} is no port")
    return TcpEndpoint(str(address), int(port))


def make_socket_path() -> Path:
    """A path for a Unix socket in a new folder that only this user may enter."""
    # The last is short wherever the others are long, and what `mkdtemp` makes there is private.
    last_resort = "/tmp"  # noqa: S108
    for parent in (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), last_resort):
        room = len(os.fsencode(parent)) + len(_PREFIX) + len(_SOCKET) + 12
        if parent and room <= _MAX_PATH_BYTES and os.access(parent, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)) / _SOCKET
    raise OSError(
        "no writable folder with a path short enough for a Unix socket; set TMPDIR to one"
    )


async def listen(
    endpoint: Endpoint, accept: Accept, backlog: int
) -> tuple[asyncio.Server, Endpoint]:
    """A server at `endpoint`, and the endpoint to publish: with the port that the kernel chose.

    Raises:
        OSError: the endpoint is taken, is not of this host, or would be every interface of it.
    """
    if isinstance(endpoint, UnixEndpoint):
        # The folder is private already; the mask keeps the socket so too, wherever it was moved.
        mask = os.umask(0o177)
        try:
            return await asyncio.start_unix_server(accept, endpoint.path, backlog=backlog), endpoint
        finally:
            os.umask(mask)
    # asyncio takes an empty host for all interfaces, and so does the kernel 0.0.0.0.
    if not endpoint.host or ipaddress.IPv4Address(endpoint.host).is_unspecified:
        raise OSError(f"{endpoint} would be every interface of this host; name one address")
    server = await asyncio.start_server(accept, endpoint.host, endpoint.port, backlog=backlog)
    return server, TcpEndpoint(endpoint.host, server.sockets[0].getsockname()[1])


async def dial(
    endpoint: Endpoint, seconds: float, limit: int = STREAM_LIMIT_BYTES
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream to whoever listens at `endpoint`; `limit` bytes are read ahead.

    Raises:
        OSError, TimeoutError: nobody answers, within `seconds`.
    """
    async with asyncio.timeout(seconds):
        if isinstance(endpoint, UnixEndpoint):
            return await asyncio.open_unix_connection(endpoint.path, limit=limit)
        return await asyncio.open_connection(endpoint.host, endpoint.port, limit=limit)


def remove_endpoint(endpoint: Endpoint) -> None:
    """Remove what a listener leaves on disk. Of TCP nothing stays."""
    if isinstance(endpoint, UnixEndpoint):
        remove_socket(endpoint.path)


def remove_socket(socket: Path) -> None:
    """Remove the socket and its folder, if they are what `make_socket_path` makes and belong to
    this user."""
    folder = socket.parent
    try:
        status = folder.lstat()
    except OSError:
        return
    ours = (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.getuid()
        and status.st_mode & 0o077 == 0
    )
    # The path may come from a file that somebody planted: nothing but a folder of our own making is
    # touched.
    if (
        ours
        and folder.name.startswith(_PREFIX)
        and socket.name == _SOCKET
        and os.listdir(folder) in ([_SOCKET], [])
    ):
        shutil.rmtree(folder, ignore_errors=True)
