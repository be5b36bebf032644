"""``python supervise_for_test.py RUN STEPS [PLAN]``: a real shell around the tiny core, for a test
to kill."""

import sys
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.supervisor.shell.start import supervise
from tests.agent.harness import config_of, created
from tests.supervisor.shell.tiny_core import TinyCore

if __name__ == "__main__":
    run = RunDirectory(Path(sys.argv[1]))
    core = TinyCore(run, steps=int(sys.argv[2]), step_seconds=0.05)
    config = config_of(run, *sys.argv[3:])
    sys.exit(supervise(config, run, created(), make_core=core))
