"""What is known of an attempt's saves does not grow with the attempt."""

import pickle

import pytest

from opt_train.run.checkpoint import MEMORY, SHARED, path_of_save
from opt_train.run.settled_saves import PATHS_KEPT, SettledSaves


def test_a_month_of_snapshots_takes_no_more_memory_than_a_day() -> None:
    """At 2,000 nodes each line of an old save was copied with every new one."""
    saves, sizes = SettledSaves(), []
    for step in range(0, 4000, 5):
        saves = saves.with_path(path_of_save("1.00", step, MEMORY))
        sizes.append(len(pickle.dumps(saves)))
    assert sizes[-1] <= sizes[PATHS_KEPT] + 16


@pytest.mark.parametrize("tier", [SHARED, MEMORY])
def test_what_was_settled_stays_so_and_what_is_newer_is_not(tier: str) -> None:
    saves = SettledSaves()
    for step in range(2 * PATHS_KEPT):
        assert path_of_save("1.00", step, tier) not in saves
        saves = saves.with_path(path_of_save("1.00", step, tier))
    assert all(path_of_save("1.00", step, tier) in saves for step in range(2 * PATHS_KEPT))
    assert path_of_save("1.00", 2 * PATHS_KEPT, tier) not in saves


def test_many_snapshots_say_nothing_of_a_slow_save() -> None:
    """A save of the shared file system may last while hundreds of snapshots are taken."""
    saves = SettledSaves()
    for step in range(4 * PATHS_KEPT):
        saves = saves.with_path(path_of_save("1.00", step, MEMORY))
    assert path_of_save("1.00", 1, SHARED) not in saves
