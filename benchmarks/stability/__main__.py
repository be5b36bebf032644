"""Sick runs: rescued, handed over or lost; left alone, under two published guards, and under ours.

    python -m benchmarks.stability                       the tuning half
    python -m benchmarks.stability --half held-out       what is reported
    python -m benchmarks.stability --quick               4 sick and 3 healthy runs, short

Each run is a whole `opt-train run` of a tiny model on real text, one rank on one local node, with
the real trainer and supervisor; a module around the rank makes it sick. What counts is the
validation loss at the end, beside that of the *twin*: the same run, to the seed, without the
sickness. *Rescued*: within 2 %. *Handed over*: stopped early, and what is named is what it was.
Whatever else is *lost*. A setting that, left alone, ends within 2 % of its twin is not sick, and
not counted. A run that was thought healthy and that ours acted on is done again left alone: where
that ends more than 2 % above ours, it was sick, and no act of ours was false.

Results are kept under `--out`, a file a run: a benchmark that was interrupted goes on where it was.
For another version of the product name another folder. The short form has fewer steps than a
sickness needs to be judged by, leaves no run alone, and takes the first healthy run for the twin:
it shows that signs are seen and answered, that going back gives what the twin has, and no more.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.stability.families import FAMILIES, QUICK
from benchmarks.stability.outcomes import Result
from benchmarks.stability.running import Runner
from benchmarks.stability.settings import (
    ALONE,
    BASES,
    CONTROLS,
    HALVES,
    OURS,
    TUNING,
    Base,
    Family,
    Run,
    healthy_runs,
    sick_run,
    twin_of,
)
from benchmarks.stability.table import as_json, healthy_of, page, row_of

STEPS, QUICK_STEPS = 1000, 240
HEALTHY, QUICK_HEALTHY = 50, 4


def main() -> None:
    """Do the runs, print the table."""
    flags = parse(sys.argv[1:])
    # Whoever ends it ends its runs too, also where a shell has it in the background.
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, signal.default_int_handler)
    if flags.quick:
        with tempfile.TemporaryDirectory(prefix="stability-benchmark-") as folder:
            measure(flags, Path(folder))
    else:
        measure(flags, flags.out)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The flags, those of the short form filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--half", choices=HALVES, default=TUNING)
    parser.add_argument("--families", nargs="+", help="names; else all of the half")
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=[*CONTROLS])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--bases", type=int, default=1, help="of each family, of the half's two")
    parser.add_argument("--healthy", type=int, default=HEALTHY, help="healthy runs")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/stability-benchmark"))
    parser.add_argument("--report", action="store_true", help="print what is there, do nothing")
    parser.add_argument("--keep", action="store_true", help="the run directories too")
    parser.add_argument("--quick", action="store_true")
    flags = parser.parse_args(words)
    if flags.quick:
        flags.families, flags.controls = [*QUICK], [OURS]
        flags.steps, flags.healthy, flags.half = QUICK_STEPS, QUICK_HEALTHY, TUNING
    known = {family.name for family in FAMILIES[flags.half]}
    if unknown := set(flags.families or ()) - known:
        parser.error(f"{', '.join(unknown)}: not of the half; it has: {'; '.join(sorted(known))}")
    return flags


def chosen(flags: argparse.Namespace) -> list[tuple[Family, Base]]:
    """Each family with its bases: in turn, so that all are met."""
    bases = BASES[flags.half]
    return [
        (family, bases[(number + n) % len(bases)])
        for number, family in enumerate(FAMILIES[flags.half])
        if not flags.families or family.name in flags.families
        for n in range(min(flags.bases, len(bases)))
    ]


def measure(flags: argparse.Namespace, folder: Path) -> None:
    """Do what is not done yet, and print."""
    runner = Runner(folder, flags.parallel, flags.keep)
    settings = chosen(flags)
    # Under ours a twin is one of the healthy runs; left alone it is nobody's doing.
    under = OURS if flags.quick else ALONE
    twins = [twin_of(family, base, flags.steps, under) for family, base in settings]
    sick = [
        sick_run(family, base, flags.steps, control)
        for family, base in settings
        for control in flags.controls
    ]
    healthy = healthy_runs(flags.half, flags.healthy, flags.steps)
    if flags.quick:
        # The highest rate is none that a run of so few steps goes well with: its warm-up is short.
        healthy = [twins[0], healthy[1], healthy[3]]
    wanted = [*twins, *sick, *healthy]

    def do(runs: Sequence[Run]) -> dict[str, Result]:
        if flags.report:
            return {run.name: known for run in runs if (known := runner.known(run))}
        return runner.do(runs, progress)

    results = do(wanted)
    # Whether a run was as well as it was thought to be, who left it alone knows.
    acted = {
        run.name: replace(run, control=ALONE)
        for run in healthy
        if run.name in results and results[run.name].acts
    }
    alone = do([*acted.values()])
    rows = []
    for (family, base), twin in zip(settings, twins, strict=True):
        found = {
            control: result
            for control in flags.controls
            if (result := results.get(sick_run(family, base, flags.steps, control).name))
        }
        loss = results[twin.name].validation if twin.name in results else None
        if loss is None or not found:
            print(f"{family.name}: no result", file=sys.stderr)
            continue
        met = sick_run(family, base, flags.steps, OURS).base
        rows.append(row_of(family, met, flags.steps, loss, found))
    sums = healthy_of(
        (run, results[run.name], alone.get(acted[run.name].name) if run.name in acted else None)
        for run in healthy
        if run.name in results
    )
    print(page(flags.half, flags.steps, rows, sums, flags.controls), flush=True)
    if not flags.quick:
        table = json.dumps(as_json(flags.half, flags.steps, rows, sums), indent=1)
        (folder / f"{flags.half}.json").write_text(table + "\n")


def progress(run: Run, result: Result) -> None:
    """One line of each run that was done."""
    loss = "-" if result.validation is None else f"{result.validation:.4f}"
    acts = " ".join(f"{act.step}:{act.alarm}:{act.rung}" for act in result.acts)
    print(
        f"{run.name}: {result.end}, validation {loss}, {result.steps_taken:,} steps, "
        f"{len(result.skipped)} left out, {result.seconds:.0f} s {acts}",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
