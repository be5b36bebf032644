"""What one layout saves, the next loads, to the bit, and goes on with the same batches: along a
chain of layouts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.train.rig import run_script

SCRIPT = Path(__file__).with_name("layout_chain_ranks.py")
TENSOR = {"layout": [1, 1, 2]}
ALONE = {"layout": [1, 1, 1]}
COMPILED = {"compile": True, "activation_checkpointing": "full"}


def follow(folder: Path, links: list[dict[str, Any]]) -> None:
    """Each link finds the tensors of the one before, and takes the step that the one before would
    have taken."""
    expected, before = None, None
    for number, link in enumerate(links):
        case = {"ways": {}, **link, "before": before, "after": f"link{number}"}
        found = run_script(
            SCRIPT, math.prod(case["layout"]), json.dumps(case), str(folder), folder=folder
        )[0]
        if expected is not None:
            assert found["first"] == pytest.approx(expected, rel=5e-6), (
                f"{links[number - 1]} -> {link}"
            )
        expected, before = found["then"], case["after"]


def test_tensor_parallel_ranks_become_one_and_two_again(tmp_path: Path) -> None:
    follow(
        tmp_path,
        [TENSOR, {**ALONE, "trouble": "evaluation"}, {**TENSOR, "trouble": "raised"}, ALONE],
    )


@pytest.mark.slow
def test_replicas_shards_and_tensor_groups_take_over_from_one_another(tmp_path: Path) -> None:
    hybrid, both, sharded = [2, 2, 1], [1, 2, 2], [1, 3, 1]
    follow(tmp_path, [{"layout": each} for each in (hybrid, both, sharded, hybrid)])


@pytest.mark.whole
def test_compiled_and_recomputing_blocks_save_and_load_what_plain_ones_do(tmp_path: Path) -> None:
    compiled = {"layout": [1, 2, 1], "ways": COMPILED}
    follow(
        tmp_path,
        [
            {**compiled, "trouble": "evaluation"},
            {**ALONE, "ways": COMPILED, "trouble": "raised"},
            ALONE,
        ],
    )
