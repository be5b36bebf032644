"""Static checks of a batch, by arithmetic that a hand can follow."""

from collections import Counter
from collections.abc import Callable, Iterable
from math import log

import numpy as np
import pytest
import torch

from opt_train.data.batch_checks import Repeats, check_batch, outside_of_vocabulary, token_entropies
from opt_train.data.batches import Batches, MicroBatch
from opt_train.data.checked_batches import check_micro_batches, outside_of
from opt_train.data.order import Cursor, SampleOrder
from opt_train.data.token_stream import TokenStream
from opt_train.stability.broken_data import REPEAT_SHARE, REPEAT_TIMES


def test_entropies_of_sequences_by_hand() -> None:
    tokens = np.array([[7, 7, 7, 7], [1, 2, 1, 2], [4, 3, 2, 1], [9, 9, 9, 5]])
    expected = [0.0, log(2), log(4), -(3 / 4) * log(3 / 4) - (1 / 4) * log(1 / 4)]
    assert token_entropies(tokens) == pytest.approx(expected)


def test_entropies_are_those_of_counting() -> None:
    tokens = np.random.default_rng(3).zipf(1.5, (6, 97)) % 50
    for row, found in zip(tokens, token_entropies(tokens), strict=True):
        shares = [count / 97 for count in Counter(row.tolist()).values()]
        assert found == pytest.approx(-sum(share * log(share) for share in shares))


def test_labels_and_duplicates_are_counted() -> None:
    tokens = np.array([[1, 2, 3], [4, 4, 4], [1, 2, 3], [3, 2, 1], [1, 2, 3]])
    labels = np.array([[2, 3, 9], [4, 4, 4], [2, 3, 9], [2, 1, 9], [2, 3, 9]])
    checks = check_batch(tokens, labels)
    assert (checks.sequences, checks.equal_labels, checks.duplicates) == (5, 3, 2)
    assert check_batch(tokens, tokens).equal_labels == 15
    assert check_batch(tokens[:0], labels[:0]).sequences == 0


def test_batches_that_come_again_in_the_same_order_are_counted_and_other_epochs_are_not() -> None:
    batch, epochs = 8, SampleOrder(40, seed=1)

    def repeats_of(places: Iterable[int], sample: Callable[[int], int]) -> list[int]:
        repeats = Repeats()
        return [
            repeats.count(place, [sample(place + row) for row in range(batch)]) for place in places
        ]

    # Five batches an epoch, each in another order: now and then half of a batch comes again.
    shares = [count / batch for count in repeats_of(range(0, 40_000, batch), epochs.index)]
    in_row = [min(shares[step : step + REPEAT_TIMES - 1]) for step in range(len(shares) - 3)]
    assert max(shares) >= REPEAT_SHARE > max(in_row)
    # A circle of three batches: the first that comes again tells how far.
    circle = repeats_of(range(0, 80, batch), lambda place: place % (3 * batch))
    assert circle == [0, 0, 0, 0, *[batch] * 6]
    assert repeats_of(range(0, 40, batch), lambda place: place % batch) == [0, 0, 8, 8, 8]
    # Whoever went back reads the same places again, and that is all that it reads again.
    replayed = [*range(0, 160, batch), *range(80, 240, batch)]
    assert repeats_of(replayed, lambda place: place) == [0] * len(replayed)
    # It goes in circles wherever it went back to.
    replayed = [*range(0, 80, batch), *range(32, 80, batch)]
    assert repeats_of(replayed, lambda place: place % batch)[-4:] == [8, 8, 8, 8]


def test_what_was_read_long_ago_is_forgotten() -> None:
    repeats = Repeats()
    for place in range(100_000):
        repeats.count(place, [place])
    assert len(repeats._places) == 4096


def test_tokens_outside_of_the_vocabulary_are_counted() -> None:
    assert outside_of_vocabulary(np.array([[0, 9], [-1, 10]]), 10) == 2
    assert outside_of_vocabulary(np.array([[0, 9]]), 10) == 0
    batch = MicroBatch(torch.tensor([[1, 2]]), torch.tensor([[2, 512]]), torch.ones(1))
    assert (outside_of([batch], 512), outside_of([batch], 513)) == (1, 0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_see_what_one_sees(world: int) -> None:
    """However a batch is shared out, and whatever a rank is padded with."""
    tokens = np.random.default_rng(5).integers(4, 30, 40 * 16 + 1).astype(np.uint16)
    batches = Batches(TokenStream([tokens]), 16, 10, seed=1)
    [alone] = [check_micro_batches(batches.at(Cursor(), data_rank=0, data_world=1, micro_batch=10))]
    shares = [
        check_micro_batches(batches.at(Cursor(), data_rank=rank, data_world=world, micro_batch=4))
        for rank in range(world)
    ]
    assert sum(share.sequences for share in shares) == alone.sequences == 10
    assert sum(share.equal_labels for share in shares) == alone.equal_labels
    entropies = sum(share.token_entropy * share.sequences for share in shares)
    assert entropies / 10 == pytest.approx(alone.token_entropy)
