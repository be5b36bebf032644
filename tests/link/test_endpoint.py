"""Where a process of the run listens: one place, published as it is, and never all interfaces."""

import asyncio
import json
from pathlib import Path

import pytest

from opt_train.link.address import Address, publish, read_address
from opt_train.link.endpoint import (
    Endpoint,
    TcpEndpoint,
    UnixEndpoint,
    dial,
    listen,
    parse_endpoint,
    remove_endpoint,
)


def ignore(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


@pytest.mark.parametrize(
    "endpoint",
    [UnixEndpoint(Path("/tmp/x/supervisor.sock")), TcpEndpoint("10.1.2.3", 4242)],
    ids=str,
)
def test_an_endpoint_is_read_as_it_was_published(tmp_path: Path, endpoint: Endpoint) -> None:
    path = tmp_path / "supervisor.json"
    publish(path, Address(endpoint, 7))
    assert read_address(path) == Address(endpoint, 7)
    assert json.loads(path.read_text()) == {"address": str(endpoint), "leader": 7}
    assert parse_endpoint(str(endpoint)) == endpoint


@pytest.mark.parametrize("host", ["", "0.0.0.0"])
def test_nobody_listens_at_all_interfaces(host: str) -> None:
    with pytest.raises(OSError, match="would be every interface of this host; name one address"):
        asyncio.run(listen(TcpEndpoint(host), ignore, 1))


def test_tcp_is_bound_to_its_one_address_and_a_free_port() -> None:
    async def scene() -> None:
        server, bound = await listen(TcpEndpoint("127.0.0.1"), ignore, 1)
        assert isinstance(bound, TcpEndpoint)
        assert [s.getsockname() for s in server.sockets] == [("127.0.0.1", bound.port)]
        # Another address of the same host, loopback's own: nobody listens there.
        with pytest.raises(ConnectionRefusedError):
            await dial(TcpEndpoint("127.0.0.2", bound.port), 5)
        _, writer = await dial(bound, 5)
        writer.close()
        server.close()
        remove_endpoint(bound)  # of TCP nothing stays on disk

    asyncio.run(scene())
