"""What `opt-train` makes of overrides: one job, or with `--multirun` one for each combination.

All of them are composed and checked before the first begins. Hydra's own multirun would run them in
one process: the second would find torch, signal handlers and the environment as the first left
them.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from opt_train.protocol.exits import DONE, INTERRUPTED, STOPPED, TERMINATED, BadInput

if TYPE_CHECKING:
    from opt_train.config.run_config import RunConfig

UNREAD = ("data.corpus=unread", "tokenizer.vocab_file=unread", "tokenizer.merges_file=unread")
"""Overrides for what a preset leaves to its user, for verbs that read no data; they come before the
user's."""


@dataclass(frozen=True, slots=True)
class Job:
    """One configuration to work on, and what it was composed of."""

    overrides: list[str]
    config: "RunConfig"
    config_directory: Path | None
    """Groups of the user's own, searched before the presets."""

    @property
    def arguments(self) -> list[str]:
        """What makes another `opt-train` compose the same configuration."""
        directory = ["--config-dir", str(self.config_directory)] if self.config_directory else []
        return [*directory, *self.overrides]


def run_jobs(flags: argparse.Namespace, run: Callable[[Job], int]) -> int:
    """Compose the jobs and obey `--cfg` and `--multirun`; a single job runs in this process.

    Raises:
        BadInput: an override is wrong, in any of the jobs.
    """
    jobs = compose_jobs(flags, flags.overrides)
    if flags.cfg:
        return print_configurations(jobs, flags.multirun)
    if flags.multirun:
        return _run_one_by_one(flags.verb, jobs)
    [job] = jobs
    return run(job)


def compose_jobs(flags: argparse.Namespace, overrides: list[str]) -> list[Job]:
    """Each job's overrides and configuration; all of them are checked before any of them starts.

    Raises:
        BadInput: an override is wrong, in any of the jobs.
    """
    # Hydra takes some 0.3 s to import, which `--help` and `status` need not wait for.
    from opt_train.config.compose import expand

    if flags.cfg not in (None, "job"):
        raise BadInput(f"--cfg={flags.cfg} is not possible; only --cfg=job is")
    if not flags.multirun:
        return [_compose(overrides, flags.config_dir)]
    jobs = [_compose(job, flags.config_dir) for job in expand(overrides, flags.config_dir)]
    if len({job.config.name for job in jobs}) == len(jobs):
        return jobs
    # Jobs of one name would resume one another in one run directory.
    return [_renamed(job, f"{job.config.name}-{number}") for number, job in enumerate(jobs)]


def _compose(overrides: list[str], config_directory: Path | None) -> Job:
    from opt_train.config.compose import compose
    from opt_train.faults import plan as faults

    config = compose(overrides, config_directory)
    # `config` does not know `faults`; a plan that cannot be read must not wait for the first rank.
    faults.parse(config.faults.plan)
    return Job(overrides, config, config_directory)


def _renamed(job: Job, name: str) -> Job:
    overrides = [*job.overrides, f"name='{name}'"]
    return replace(job, overrides=overrides, config=replace(job.config, name=name))


def print_configurations(jobs: list[Job], multirun: bool) -> int:
    """Print each job's resolved configuration as YAML; a multirun's as documents of one stream."""
    from opt_train.config.compose import to_yaml

    for number, job in enumerate(jobs):
        if multirun:
            separator = f"---{os.linesep}" if number else ""
            print(f"{separator}# job {number}: {' '.join(job.overrides)}")
        print(to_yaml(job.config), end="")
    return DONE


def _run_one_by_one(verb: str, jobs: list[Job]) -> int:
    """One job after another, each a process of its own; a failed job does not keep the next from
    running."""
    codes: list[int] = []
    for number, job in enumerate(jobs):
        print(f"job {number} of {len(jobs)}: {' '.join(job.overrides)}", flush=True)
        codes.append(call([verb, *job.arguments]))
        # Whoever stopped one job did not want the next to begin; 75 of a child is a stop as well.
        if codes[-1] in (STOPPED, INTERRUPTED, TERMINATED):
            print(f"stopped; the same command goes on with {job.config.name}")
            break
    for number, code in enumerate(codes):
        outcome = "done" if code == DONE else f"exit {code}"
        print(f"job {number} {jobs[number].config.name}: {outcome}")
    return next((code for code in codes if code != DONE), DONE)


def call(arguments: list[str]) -> int:
    """`opt-train` with `arguments` as a process of its own, with this one's terminal; its exit
    code.

    Ctrl-C reaches the child too, so this process only waits for the child's own answer; TERM and
    USR1, which reach this one alone, are handed on.
    """
    children: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def hand_on(number: int, *_: object) -> None:
        # One that comes while there is no child yet is for the child too.
        early.extend([] if children else [number])
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        # -P: a file of the user's that is called datasets.py is not the library.
        child = subprocess.Popen([sys.executable, "-P", "-m", "opt_train.cli.main", *arguments])
        children.append(child)
        for number in early:
            child.send_signal(number)
        while True:
            try:
                code = child.wait()
            except KeyboardInterrupt:
                # The terminal sent it to the child too, which saves first: only its own exit code
                # says what came of that.
                continue
            # As a shell reports a child that a signal ended.
            return code if code >= 0 else 128 - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
