"""The recipes of the nine sizes as a plan reads them, and their rehearsals in one process of their
own."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from opt_train.cli.jobs import UNREAD
from opt_train.config.compose import compose
from opt_train.config.run_config import RunConfig
from opt_train.plan.plan import Plan, plan_of
from opt_train.plan.throughput import GPUS, OPT_MFU
from tests.train.rig import environment

SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")


@cache
def recipe(size: str, *overrides: str) -> RunConfig:
    """The configuration of `experiment=opt-SIZE`."""
    return compose([*UNREAD, f"experiment=opt-{size}", *overrides])


def with_layers(config: RunConfig, layers: int) -> RunConfig:
    """The same with fewer layers: all of a step grows by the layer, so a few rehearse as well as
    all."""
    return replace(config, model=replace(config.model, layers=layers))


def planned(config: RunConfig) -> Plan:
    """The plan on A100s of 80 GB."""
    return plan_of(config, GPUS["A100"], OPT_MFU)


def rehearsed(configs: list[RunConfig], seconds: float) -> list[dict[str, Any]]:
    """What `opt_train.rehearsal.rehearse` says of each of `configs`."""
    command = [sys.executable, "-P", "-m", "opt_train.rehearsal.rehearse"]
    text = json.dumps([asdict(config) for config in configs])
    done = subprocess.run(
        command,
        input=text,
        text=True,
        capture_output=True,
        env=environment(),
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
