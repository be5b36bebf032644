"""Metrics to Weights & Biases: one W&B run for the life of a run directory, so that restarts go on
with its curves."""

import secrets
from collections.abc import Mapping
from typing import Any, Literal, cast

import wandb
from opt_logbook.record.durable_file import replace_file
from opt_logbook.record.run_directory import RunDirectory

from opt_train.sinks.config import SinksConfig
from opt_train.sinks.metrics_tail import MetricsLine


class WandbSink:
    """W&B's own files lie in `sinks/wandb`."""

    def __init__(
        self, run: RunDirectory, config: SinksConfig, configuration: Mapping[str, Any]
    ) -> None:
        # No hardware statistics, console or code: those would cost the ranks' cores time, and the
        # journal has them.
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            silent=True,
            quiet=True,
        )
        self._run = wandb.init(
            project=config.wandb_project,
            id=_run_id(run),
            name=run.path.name,
            resume="allow",
            mode=cast(Literal["offline", "online"], config.wandb_mode),
            dir=str(run.path / "sinks"),
            config=dict(configuration),
            settings=settings,
        )
        # W&B's own step must grow for ever and a rollback's does not: the curves are drawn over
        # ours.
        self._run.define_metric("*", step_metric="step")

    def send(self, line: MetricsLine, number: int) -> None:
        """Hand one step over. `number` is W&B's own step: a line that is sent twice overwrites
        itself."""
        self._run.log({**line.values, "step": line.step, "attempt": line.attempt}, step=number)

    def flush(self) -> None:
        """Nothing to do: W&B's own process has the lines, and outlives this one."""

    def close(self) -> None:
        self._run.finish()


def _run_id(run: RunDirectory) -> str:
    """The id that the directory was given when it was first shown to W&B."""
    path = run.path / "sinks" / "wandb-run-id"
    try:
        found = path.read_text().strip()
    except FileNotFoundError:
        found = ""
    if not found:
        found = secrets.token_hex(6)
        replace_file(path, f"{found}\n".encode())
    return found
