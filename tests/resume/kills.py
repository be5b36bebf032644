"""Seeded kills of a run that trains, and the proof that they change nothing: `make test-resume`.

For each precision the same small run, dropout on, is trained twice by `opt-train train` with two
ranks: once in peace, and once with its ranks killed again and again, at moments that the seed
chooses (`struck_rank.draw`). Weights, optimizer state, counters, loss scale and every step's
metrics, repeated steps included, must be the same to the bit.

Leave opt_train/ as it is meanwhile: a run does not go on with other code, and the ranks would say
so and leave.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tests.end_to_end import driving
from tests.resume.struck_rank import (
    IN_PEACE,
    Generation,
    Strike,
    Struck,
    draw,
    record_of,
    strikes_in,
)
from tests.train import forked
from tests.train.rig import ROOT, environment, tensors_in

PRECISIONS = ("fp32", "bf16", "fp16", "fp16-memory-efficient")
EVERY_STEPS = 4
STEPS_PER_KILL = 10
STEPS_AT_LAST = 16
"""Together more than attempts get through until their strikes: the run must not end first. An
attempt is struck at its second save at the latest, so it leaves a checkpoint that is two saves
further at most."""
WORLD_SIZE = 2

OVERRIDES = (
    *driving.TINY,
    "name=run",
    "model.d_model=32",
    "model.ffn=64",
    "train.micro_batch=2",
    "train.collective_timeout_seconds=60",
    f"checkpoint.every_steps={EVERY_STEPS}",
)
MOVING_SCALE = {
    "fp16": (
        "precision.loss_scale=megatron",
        "precision.loss_scale_initial=16384",
        "precision.loss_scale_window_steps=6",
    ),
    "fp16-memory-efficient": (
        "precision.loss_scale_initial=4096",
        "precision.loss_scale_window_steps=8",
    ),
}
"""Near where gradients overflow, and quick to grow: a restore that forgot some of its state would
show soon."""

OF_THE_ATTEMPT = {"attempt", "generation", "configuration_sha256", "journal_head"}
"""What a checkpoint's state says of who saved it, which is not training's."""
SAME = (
    "step",
    "updates",
    "samples",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "grad_norm_clipped",
    "activation_norm",
    "loss_scale",
    "overflow",
    "skipped",
)
"""What a metrics line says of training, as opposed to the machine."""


class Difference(Exception):
    """A killed run did not come to what the undisturbed one did."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill and what came of it."""

    seed: str
    strike: Strike
    struck: Struck
    resumed_step: int

    @property
    def steps_lost(self) -> int:
        return max(0, self.struck.step - self.resumed_step)

    def __str__(self) -> str:
        who = "both ranks" if self.strike.takes_all else f"rank {self.strike.rank}"
        came = (
            f"{self.struck.moment} + {1000 * self.strike.delay_seconds:.1f} ms, in "
            f"{self.struck.phase}"
        )
        at = f"at step {self.struck.step}" if self.struck.step >= 0 else "before its first step"
        return (
            f"{self.seed:<28} {who:<10} {came:<34} {at:<21} resumed from {self.resumed_step}, "
            f"lost {self.steps_lost}"
        )


class Starter:
    """The process that starts ranks."""

    def __enter__(self) -> Self:
        asked, ask = os.pipe()
        answer, answers = os.pipe()
        with contextlib.ExitStack() as files:
            self._errors = files.enter_context(tempfile.TemporaryFile())
            self._ask = files.enter_context(open(ask, "w"))
            self._answer = files.enter_context(open(answer))
            with open(asked) as stdin, open(answers, "w") as stdout:
                self._process = forked.server().start(
                    ["-m", "tests.resume.struck_rank"],
                    stdin=stdin,
                    stdout=stdout,
                    stderr=self._errors,
                    env=environment(),
                    cwd=ROOT,
                )
            self._files = files.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # its ranks die with it
        self._process.wait()
        self._files.close()

    def start(self, generation: Generation) -> list[int]:
        """Start the ranks and wait for their end; their exit codes, of a killed one minus the
        signal."""
        self._ask.write(json.dumps(asdict(generation)) + "\n")
        self._ask.flush()
        if not (answer := self._answer.readline()):
            self._errors.seek(0)
            said = self._errors.read().decode()
            raise AssertionError(f"the process that starts ranks has ended:\n{said}")
        codes: list[int] = json.loads(answer)
        return codes


def kill_and_compare(
    starter: Starter,
    folder: Path,
    precision: str,
    seed: int,
    kills: int,
    say: Callable[[str], None] = print,
) -> list[Kill]:
    """Train twice in `folder`, once with `kills` kills.

    Raises:
        Difference: what the two came to differs in a bit, or not all kills came.
    """
    steps = STEPS_PER_KILL * kills + STEPS_AT_LAST
    seeds = [f"{seed}/{precision}/{number}" for number in range(kills)]
    strikes = [draw(each) for each in seeds]
    whole, killed = folder / "whole", folder / "killed"
    words = (
        "train",
        *OVERRIDES,
        f"data.directory={folder.parent / 'data'}",
        f"train.steps={steps}",
    )
    words = (*words, f"precision={precision}", *MOVING_SCALE.get(precision, ()))
    for each in (whole, killed):
        each.mkdir(parents=True)
        (each / "strikes.json").write_text(json.dumps([asdict(strike) for strike in strikes]))
    if not (folder.parent / "data").exists():
        train(starter, whole, ("prepare", *words[1:]), IN_PEACE, world_size=1)

    train(starter, whole, words, IN_PEACE)
    run, found = driving.run_directory(killed), []
    struck: Struck | None = None
    for number in (*range(kills), IN_PEACE):
        train(starter, killed, words, number)
        attempts = driving.of_kind(run, "attempt_started")
        if struck is not None:
            found.append(
                Kill(seeds[len(found)], strikes[len(found)], struck, attempts[-1].step or 0)
            )
            say(str(found[-1]))
        if number != IN_PEACE:
            struck = Struck(**json.loads(record_of(killed, number).read_text()))
    if len(attempts) != kills + 1:
        raise Difference(f"{kills} kills made {len(attempts)} attempts")
    compare(driving.run_directory(whole), run, steps)
    return found


def train(
    starter: Starter, folder: Path, words: Sequence[str], number: int, world_size: int = WORLD_SIZE
) -> None:
    """One generation of ranks: to the end of the run, or to strike `number`.

    Raises:
        Difference: it ended in another way.
    """
    words = (*words, f"runs={folder / 'runs'}")
    codes = starter.start(
        Generation(words=words, world_size=world_size, folder=str(folder), number=number)
    )
    if number == IN_PEACE and any(codes):
        raise Difference(f"{folder.name}: the ranks ended with {codes}:\n{driving.tail(folder)}")
    if number != IN_PEACE and not record_of(folder, number).exists():
        strike = strikes_in(folder)[number]
        raise Difference(
            f"kill {number} did not come ({strike}); the ranks ended with "
            f"{codes}:\n{driving.tail(folder)}"
        )


# What must be the same ----------------------------------------------------------------------------


def compare(whole: driving.RunDirectory, killed: driving.RunDirectory, steps: int) -> None:
    """Every line of every attempt, then the last checkpoints, bit for bit.

    Raises:
        Difference: the first one found.
    """
    expected = {
        step: line for lines in driving.metrics(whole).values() for step, line in lines.items()
    }
    if sorted(expected) != list(range(1, steps + 1)):
        raise Difference(f"the undisturbed run has {len(expected)} metrics lines for {steps} steps")
    seen = set()
    for attempt, lines in driving.metrics(killed).items():
        for step, line in lines.items():
            seen.add(step)
            for name in SAME:
                if bits(line[name]) != bits(expected[step][name]):
                    raise Difference(
                        f"attempt {attempt}, step {step}: {name} is {bits(line[name])}, "
                        f"undisturbed {bits(expected[step][name])}"
                    )
    # The lines of a dying attempt's last steps may go with it, but then they are done again.
    if missing := set(expected) - seen:
        raise Difference(f"no metrics line of steps {sorted(missing)}")
    compare_checkpoints(last_checkpoint(whole, steps), last_checkpoint(killed, steps))


def bits(value: Any) -> str:
    return value.hex() if isinstance(value, float) else repr(value)


def last_checkpoint(run: driving.RunDirectory, steps: int) -> Path:
    entry = driving.of_kind(run, "checkpoint_committed")[-1]
    if entry.step != steps:
        raise Difference(f"{run.path} ends with a checkpoint of step {entry.step}, not {steps}")
    return run.path / entry.event.path


def compare_checkpoints(whole: Path, killed: Path) -> None:
    expected, found = tensors_in(whole), tensors_in(killed)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise Difference(
                f"tensor {name[0]} at {name[1]} has other bits, or is in one of the two alone"
            )
    if len(expected) < 50:
        raise Difference(f"only {len(expected)} tensors were compared")
    states = [
        without_attempt(json.loads((folder / "state.json").read_text()))
        for folder in (whole, killed)
    ]
    for name in sorted(states[0].keys() | states[1].keys()):
        if states[0].get(name) != states[1].get(name):
            raise Difference(
                f"state.json: {name} is {states[1].get(name)}, undisturbed {states[0].get(name)}"
            )


def without_attempt(state: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: json.dumps(value, sort_keys=True)
        for name, value in state.items()
        if name not in OF_THE_ATTEMPT
    }


# The command --------------------------------------------------------------------------------------


def summary(kills: Sequence[Kill], seconds: float) -> str:
    lost = [kill.steps_lost for kill in kills]
    moments = Counter(kill.struck.moment for kill in kills)
    hit = ", ".join(f"{moment} {count}" for moment, count in moments.most_common())
    alone = sum(not kill.strike.takes_all for kill in kills)
    return (
        f"{len(kills)} kills in {seconds / 60:.1f} min, all bits the same; steps lost: median "
        f"{statistics.median(lost):g}, max {max(lost)}, in all {sum(lost)}\nhit: {hit}; one rank "
        f"of two {alone}, "
        f"both {len(kills) - alone}"
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.resume.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="in all (default: 50)")
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: all in turn, the kills divided among them"
    )
    chosen = parser.parse_args(arguments)
    if chosen.kills < 1:
        parser.error(f"--kills={chosen.kills} must be 1 or more")
    seed = random.SystemRandom().randrange(1_000_000) if chosen.seed is None else chosen.seed
    precisions = [chosen.precision] if chosen.precision else list(PRECISIONS)
    say(f"seed {seed}, {chosen.kills} kills")
    began = time.monotonic()
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory(prefix="opt-train-kills-") as folder, Starter() as starter:
        for number, precision in enumerate(precisions):
            share = chosen.kills // len(precisions) + (number < chosen.kills % len(precisions))
            if not share:
                continue
            part = time.monotonic()
            try:
                kills += kill_and_compare(
                    starter, Path(folder, precision), precision, seed, share, say
                )
            except Difference as error:
                again = (
                    f"python -m tests.resume.kills --seed {seed} --precision {precision} "
                    f"--kills {share}"
                )
                say(f"DIFFERENT: {precision}: {error}\nagain with: {again}")
                return 1
            say(f"{precision}: {share} kills, the same bits ({time.monotonic() - part:.0f} s)")
    say(summary(kills, time.monotonic() - began))
    return 0


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
