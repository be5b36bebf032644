"""The sample order: every sample once an epoch, the same for ever, whoever asks and wherever they
start."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_train.data.order import Cursor, SampleOrder

GOLDEN_TEN = [6, 0, 1, 8, 3, 4, 9, 5, 7, 2, 0, 2, 8, 7, 3, 6, 5, 4, 1, 9, 0, 2, 7, 4, 3]
GOLDEN_MILLION = [798690, 697912, 630117, 977507, 891384, 550025]
GOLDEN_TRILLION = 306443130386


@given(samples=st.integers(1, 700), seed=st.integers(-5, 2**70), epoch=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_no_sample_is_missed_or_read_twice_in_an_epoch(samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(samples, seed)
    first = epoch * samples
    assert sorted(order.index(position) for position in range(first, first + samples)) == list(
        range(samples)
    )


@pytest.mark.parametrize(
    "samples", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097]
)
def test_sizes_around_the_network_s_powers_of_four_are_permutations(samples: int) -> None:
    order = SampleOrder(samples, 7)
    assert sorted(map(order.index, range(samples))) == list(range(samples))


def test_the_order_never_changes_between_versions() -> None:
    # Golden values: if these change, every run that resumes reads other data than it would have.
    assert [SampleOrder(10, 0).index(p) for p in range(25)] == GOLDEN_TEN
    assert [
        SampleOrder(1_000_003, 42).index(p) for p in (0, 1, 2, 999_999, 1_000_002, 1_000_003)
    ] == GOLDEN_MILLION
    assert SampleOrder(10**12, 1).index(10**13 + 5) == GOLDEN_TRILLION


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder(1000, 3)
    epochs = [tuple(order.index(e * 1000 + p) for p in range(1000)) for e in range(3)]
    assert len(set(epochs)) == 3
    other = SampleOrder(1000, 4)
    assert tuple(other.index(p) for p in range(1000)) not in epochs


def test_neighbours_in_the_order_are_not_neighbours_in_the_data() -> None:
    """A weak permutation would give runs of consecutive samples, that is, batches of one
    document."""
    samples = 10_000
    order = SampleOrder(samples, 11)
    positions = [order.index(p) for p in range(samples)]
    adjacent = sum(abs(a - b) == 1 for a, b in pairwise(positions))
    assert adjacent < 20  # 2 are expected of a random order
    fixed = sum(p == index for p, index in enumerate(positions))
    assert fixed < 12  # 1 is expected
    # The first tenth of the epoch draws evenly from all tenths of the data: 100 each, standard
    # deviation 9.
    tenths = [0] * 10
    for index in positions[:1000]:
        tenths[index * 10 // samples] += 1
    assert all(60 <= count <= 140 for count in tenths)


def test_a_cursor_counts_samples_and_knows_its_epoch() -> None:
    order = SampleOrder(10, 0)
    cursor = Cursor().advance(7)
    assert (cursor.samples, cursor.epoch(order)) == (7, 0)
    assert cursor.advance(3).epoch(order) == 1
    assert cursor.samples == 7


@pytest.mark.parametrize(("samples", "position"), [(0, 0), (5, -1)])
def test_impossible_questions_are_refused(samples: int, position: int) -> None:
    with pytest.raises(ValueError, match=r"sample|position"):
        SampleOrder(samples, 0).index(position)
