"""A run directory is removed under living agents and the run begun anew: nothing of the old run is
left beside it."""

import shutil
import signal
from pathlib import Path

from tests.end_to_end import driving


def test_ranks_of_a_removed_run_do_not_live_beside_the_new_one(tmp_path: Path) -> None:
    process = driving.start(tmp_path, *driving.ENDLESS)
    run = driving.run_directory(tmp_path)
    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 3, 120, process, tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        old = set(driving.processes_of(tmp_path))
        assert len(old) >= 5, "three agents and two ranks should have outlived their supervisor"
        while (
            run.path.exists()
        ):  # the living may write into a folder that is being emptied, never bring one back
            shutil.rmtree(run.path, ignore_errors=True)

        process = driving.start(tmp_path, *driving.ENDLESS)
        driving.wait_for(lambda: driving.newest_step(run) >= 3, 120, process, tmp_path)
        assert not old & set(driving.processes_of(tmp_path))
        process.send_signal(signal.SIGINT)
        assert driving.finish(process, tmp_path, 60) == 75, driving.tail(tmp_path)
    finally:
        driving.end(process, tmp_path)
