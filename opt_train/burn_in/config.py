"""What a node must pass before a run relies on it, and how long that may take."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import BELOW_ONE, NOT_NEGATIVE, OPERATIONAL, POSITIVE


@dataclass(frozen=True, kw_only=True, slots=True)
class BurnInConfig:
    """When nodes are tested, with how much, and the norms of the site."""

    key_kind: ClassVar = OPERATIONAL

    before_run: bool = False
    """Test every node before the first attempt of a start; what is unfit does not begin."""
    on_arrival: bool = False
    """Test each buffer node when it has joined."""
    every_seconds: Annotated[float, NOT_NEGATIVE] = 0.0
    """Test buffer nodes again after this long; 0: never."""

    return_seconds: Annotated[float, NOT_NEGATIVE] = 0.0
    """So long after a node has failed of what need not be its hardware it is tested, and stands by
    again if it passes; 0: never."""

    seconds: Annotated[float, POSITIVE] = 180.0
    """Longest time for the tests of one node; what has not ended by then is killed, and failed."""
    matmul_size: Annotated[int, NOT_NEGATIVE] = 0
    """Rows of the square matrices; 0: 8192 on a GPU, 512 on a CPU."""
    matmul_seconds: Annotated[float, NOT_NEGATIVE] = 5.0
    """How long the same product is computed again and again; 0: not at all."""
    gpu_memory_share: Annotated[float, BELOW_ONE] = 0.8
    """Part of a GPU's free memory that is filled and read back."""
    host_memory_bytes: Annotated[int, NOT_NEGATIVE] = 1 << 26
    """Of the node's memory, for each slot, likewise."""
    file_bytes: Annotated[int, NOT_NEGATIVE] = 1 << 26
    """Size of the file that is written to the node's disk, and of the one to the shared file
    system; 0: neither."""
    pair_rounds: Annotated[int, NOT_NEGATIVE] = 3
    """Rounds of all-reduces in which every node has another partner: fewer bad nodes than rounds
    are always told from good ones (one fewer where the nodes are odd in number). 0: none."""
    pair_bytes: Annotated[int, POSITIVE] = 1 << 26
    """Size of such an all-reduce."""
    pair_seconds: Annotated[float, POSITIVE] = 120.0
    """Longest time for a round."""

    flops: Annotated[float, NOT_NEGATIVE] = 0.0
    """The site's norm: FLOP/s of a matrix product that a slot must reach; this and the norms below
    are not asked for where they are 0."""
    disk_bytes_per_second: Annotated[float, NOT_NEGATIVE] = 0.0
    """Of writing to the node's disk, fsync included."""
    shared_bytes_per_second: Annotated[float, NOT_NEGATIVE] = 0.0
    """Of writing to the shared file system, by one node while all write."""
    pair_bytes_per_second: Annotated[float, NOT_NEGATIVE] = 0.0
    """Bus bandwidth of an all-reduce between two nodes: what InfiniBand reaches here and sockets
    do not."""
    cores: Annotated[int, NOT_NEGATIVE] = 0
    """That a program of the node may use."""
    clock_seconds: Annotated[float, POSITIVE] = 5.0
    """Farthest that a node's clock may be from that of the majority."""
    majority_share: Annotated[float, BELOW_ONE] = 0.5
    """A node that reaches less than this part of what the majority does is slow; 0: nodes are not
    compared."""
