"""Where a run's supervisor listens, published in the run directory by rename."""

import json
from dataclasses import dataclass
from pathlib import Path

from opt_logbook.record.durable_file import replace_file

from opt_train.link.endpoint import Endpoint, parse_endpoint

_MAX_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Address:
    """A supervisor's endpoint and the number it leads with."""

    endpoint: Endpoint
    leader: int


def publish(path: Path, address: Address) -> None:
    """Replace the file at `path`, so that agents find the supervisor."""
    # An agent reads the one before or this one, never a half.
    published = {"address": str(address.endpoint), "leader": address.leader}
    replace_file(path, json.dumps(published).encode() + b"\n")


def read_address(path: Path) -> Address | None:
    """The published address; None if there is none, or the file is not one."""
    try:
        with path.open("rb") as file:
            published = json.loads(file.read(_MAX_FILE_BYTES))
        endpoint, leader = parse_endpoint(published["address"]), published["leader"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    # bool is an int to isinstance: a planted true must not lead.
    return Address(endpoint, leader) if type(leader) is int else None
