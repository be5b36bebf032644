"""The address to listen at: that of one network interface."""

import contextlib
import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915


def address_of_interface(interface: str) -> str:
    """The IPv4 address of a network interface; without one, what this host's name stands for. May
    ask a name server.

    As for NCCL, `interface` may be several names, with commas, and the beginning of a name.

    Raises:
        OSError: there is no such interface, it has no address, or the name is unknown.
    """
    if not interface:
        return str(socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)[0][4][0])
    names = [name for _, name in socket.if_nameindex()]
    prefixes = interface.removeprefix("=").split(",")
    candidates = [
        name
        for prefix in prefixes
        for name in sorted(names, key=lambda name: name != prefix)
        if name.startswith(prefix) and prefix
    ]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in candidates:
            # The standard library knows an interface's number, not its address: ask the kernel.
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                return socket.inet_ntoa(answer[20:24])
    raise OSError(
        f"no network interface {interface!r} with an IPv4 address; there are: {', '.join(names)}"
    )
