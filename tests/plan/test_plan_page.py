"""What a person reads: the page in the documentation, and numbers that mean what they say."""

from pathlib import Path

import pytest

from opt_train.plan.page import in_units, page, table
from tests.plan.presets import planned, recipe

ROOT = Path(__file__).resolve().parents[2]


def test_the_plan_in_the_documentation_is_todays() -> None:
    assert page(planned(recipe("175b"))) in (ROOT / "docs" / "plan.md").read_text()


def test_a_long_step_is_told_in_seconds_without_an_exponent() -> None:
    """992 sequences on one node take 124 times the 20 s of all nodes."""
    assert "  2,482 s at an assumed MFU" in page(planned(recipe("175b", "cluster.nodes=1")))


def test_bytes_are_told_in_a_unit_that_a_person_can_compare() -> None:
    assert [
        in_units(size)
        for size in (0, 16, 1_500, 60_063_748, 88_883_551_168, 1_746 * 10**9, 25_780 * 10**12)
    ] == [
        "0 B",
        "16 B",
        "1.5 kB",
        "60.06 MB",
        "88.88 GB",
        "1.746 TB",
        "25.78 PB",
    ]


def test_columns_stand_under_their_heads() -> None:
    lines = table(
        "things", ["one", "two"], [("a", ["1", "22"]), ("b", ["333,333,333,333", "4"])]
    ).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_a_small_plan_is_told_in_megabytes() -> None:
    small = page(planned(recipe("125m", "model=tiny", "train.micro_batch=1")))
    assert "memory of a rank, MB" in small
    assert "memory of a rank, GB" in page(planned(recipe("125m")))


def test_the_last_node_is_not_promised_a_run_without_it() -> None:
    assert "nothing is left" in page(planned(recipe("125m")))


@pytest.mark.parametrize(
    ("layout", "mend"),
    [
        (("parallel.shard=124",), ("parallel.shard=0",)),
        (("parallel.replicate=4",), ("parallel.replicate=1",)),
        (
            ("parallel.replicate=4", "parallel.shard=31"),
            ("parallel.replicate=1", "parallel.shard=0"),
        ),
    ],
)
def test_what_goes_on_one_node_fewer_is_what_is_named(
    layout: tuple[str, ...], mend: tuple[str, ...]
) -> None:
    assert f"does not go on 123 nodes; {' '.join(mend)} would" in page(
        planned(recipe("175b", *layout))
    )
    assert planned(recipe("175b", *layout, *mend)).without_a_node is not None


def test_a_batch_of_many_micro_batches_says_how_many() -> None:
    assert "992 sequences on 124 data-parallel ranks are 4 x 2 on each" in page(
        planned(recipe("175b", "train.micro_batch=2"))
    )
