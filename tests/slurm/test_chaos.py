"""Everything that `make chaos` does to a run, with one seed."""

from pathlib import Path

import pytest

from tests.slurm import chaos
from tests.slurm.site import UNABLE

pytestmark = [
    pytest.mark.skipif(bool(UNABLE), reason=UNABLE),
    pytest.mark.timeout(1500),
]


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param("healing", marks=pytest.mark.slow),
        pytest.param("without-healing", marks=pytest.mark.whole),
    ],
)
def test_a_run_lives_through_all_of_it(plan: str, tmp_path: Path) -> None:
    chaos.PLANS[plan](tmp_path, 7, print)
