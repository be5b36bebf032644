"""How sequences are shared between ranks and fall into micro-batches. Standard library only.

Batches are counted in sequences, as OPT really ran them: one for each of 124 x 8 GPUs, 992 and not
the 1024 that "2M tokens" would be, which does not divide over them.
"""

BEARABLE_PADDING = 0.05
"""Part of a share up to which padding is no reason for smaller micro-batches."""


def share_of(count: int, rank: int, world: int) -> range:
    """The contiguous part of `range(count)` that is `rank`'s; sizes differ by at most one, rank 0's
    is the largest."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    size, larger = divmod(count, world)
    first = rank * size + min(rank, larger)
    return range(first, first + size + (rank < larger))


def micro_batches_of(share: int, micro_batch: int) -> tuple[int, int]:
    """How many micro-batches, and of how many sequences, a share of `share` sequences is computed
    in.

    Of `micro_batch` sequences at most, all of them alike: 9 by 8 are three of 3, where two of 5
    would pad one sequence and 8 and 8 seven. Each costs another gathering of the weights, so there
    are at most twice as many as need be.
    """
    fewest = -(-share // micro_batch)
    if fewest * -(-share // fewest) <= share * (1 + BEARABLE_PADDING):
        number = fewest
    else:
        number = min(range(fewest, 2 * fewest + 1), key=lambda n: n * -(-share // n))
    return number, -(-share // number)
