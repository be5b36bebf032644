"""What parameters one rank computes with, and how many of them it keeps. Standard library only."""

from collections.abc import Iterable
from typing import NamedTuple

from opt_train.model.config import ModelConfig
from opt_train.model.sizes import POSITION_OFFSET


class Piece(NamedTuple):
    """A rank's part of one parameter, as tensor parallelism splits it; FSDP spreads its rows over
    data ranks."""

    rows: int
    columns: int
    """1 for a vector."""
    whole: bool = False
    """Every rank of a tensor group has all of it, so its gradient is summed over them."""

    @property
    def elements(self) -> int:
        return self.rows * self.columns


def block_pieces(model: ModelConfig, tensor: int) -> tuple[Piece, ...]:
    """One decoder layer's parameters on one of `tensor` ranks
    (`opt_train.parallel.tensor.split_over`)."""
    d, ffn = model.d_model, model.ffn
    by_rows = [Piece(d // tensor, d), Piece(d // tensor, 1)]
    return (
        *by_rows,
        *by_rows,
        *by_rows,  # queries, keys, values
        Piece(d, d // tensor),
        Piece(d, 1, whole=True),
        Piece(ffn // tensor, d),
        Piece(ffn // tensor, 1),
        Piece(d, ffn // tensor),
        Piece(d, 1, whole=True),
        *[Piece(d, 1, whole=True)] * 4,  # two LayerNorms
    )


def root_pieces(model: ModelConfig, tensor: int) -> tuple[Piece, ...]:
    """All other parameters on one of `tensor` ranks: embeddings, projections, the final
    LayerNorm."""
    d, width = model.d_model, model.embedding_width
    pieces = [
        Piece(model.vocab_size // tensor, width),
        Piece(model.positions + POSITION_OFFSET, d, whole=True),
    ]
    if width != d:
        pieces += [Piece(d // tensor, width), Piece(width // tensor, d)]
    if model.layer_norm == "pre":
        pieces += [Piece(d, 1, whole=True)] * 2
    return tuple(pieces)


def elements(pieces: Iterable[Piece]) -> int:
    """Elements of all `pieces` together."""
    return sum(piece.elements for piece in pieces)


def sharded(pieces: Iterable[Piece], shard: int) -> int:
    """Elements that rank 0 of `shard` ranks keeps. Rows do not always divide evenly, and it has the
    most."""
    return sum(-(-piece.rows // shard) * piece.columns for piece in pieces)


def padded(pieces: Iterable[Piece], shard: int) -> int:
    """Elements of the buffers that gather from `shard` ranks and scatter to them: each one's share
    is rank 0's."""
    return shard * sharded(pieces, shard)
