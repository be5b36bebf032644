"""The rows, the sums and the page that they are printed as."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.stability import outcomes
from benchmarks.stability.outcomes import OUTCOMES, RESCUED, Result
from benchmarks.stability.settings import ALONE, OURS, Base, Family, Run

NOT_SICK = "not sick"
EXTRA_MEAN, EXTRA_MAX = 0.03, 0.15
CURED_LEAST, LOST_MOST = 0.95, 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sick setting beside its twin."""

    family: str
    kind: str
    curable: bool
    base: str
    twin: float
    """Validation loss, nats a token."""
    excess: Mapping[str, float]
    """Control -> how much worse than the twin's it is, as a part of that; infinite: not finite, or
    the run was stopped."""
    outcomes: Mapping[str, str]
    """Control -> one of `outcomes.OUTCOMES`; of ours left alone `NOT_SICK` where it is not."""
    extra: float | None = None
    delay: int | None = None
    rung: str = ""
    named: tuple[str, ...] = ()
    """Alarms that ours has answered and causes of incidents, in order."""
    false_acts: int = 0
    false_skips: int = 0

    @property
    def is_sick(self) -> bool:
        return self.outcomes.get(ALONE) != NOT_SICK


@dataclass(frozen=True, kw_only=True, slots=True)
class Healthy:
    """All healthy runs together."""

    runs: int = 0
    steps: int = 0
    odd_batches: int = 0
    odd_batches_skipped: int = 0
    false_skips: int = 0
    false_acts: int = 0
    incidents: int = 0
    """Ranks that ended, whatever of."""
    alarms: Mapping[str, int] | None = None
    peers_skip: Mapping[str, int] | None = None
    sick: Mapping[str, float] | None = None
    """Runs that were none: left alone they end so much worse than under ours, as a part of that.
    They are in no other number."""


def row_of(
    family: Family, base: Base, steps: int, twin: float, results: Mapping[str, Result]
) -> Row:
    """The row of one setting.

    Args:
        twin: its validation loss.
        results: by control; those that are missing are left blank.
    """
    onset = family.begins(steps)
    became = {name: outcomes.outcome_of(result, twin, family) for name, result in results.items()}
    if ALONE in results and not outcomes.is_sick(results[ALONE], twin):
        became[ALONE] = NOT_SICK
    excess = {name: outcomes.excess(result, twin) for name, result in results.items()}
    common: dict[str, Any] = {
        "family": family.name,
        "kind": family.kind,
        "curable": family.curable,
        "base": base.name,
        "twin": twin,
        "excess": excess,
        "outcomes": became,
    }
    ours = results.get(OURS)
    if ours is None:
        return Row(**common)
    return Row(
        **common,
        extra=outcomes.extra_share(ours, steps) if ours.end == outcomes.FINISHED else None,
        delay=outcomes.delay(ours, onset),
        rung=outcomes.rung_that_worked(ours, onset),
        named=outcomes.named(ours),
        false_acts=outcomes.false_acts(ours, onset),
        false_skips=outcomes.false_skips(ours, onset),
    )


def healthy_of(results: Iterable[tuple[Run, Result, Result | None]]) -> Healthy:
    """The sums over healthy runs, each with what it came to under ours and, where that acted, left
    alone."""
    found: list[tuple[Run, Result]] = []
    sick: dict[str, float] = {}
    for run, result, alone in results:
        ours = result.validation
        if alone is not None and ours is not None and outcomes.is_sick(alone, ours):
            sick[run.base.name] = outcomes.excess(alone, ours)
        else:
            found.append((run, result))
    alarms: Counter[str] = Counter()
    peers: Counter[str] = Counter()
    skipped_odd = 0
    for run, result in found:
        alarms.update(act.alarm for act in result.acts)
        peers.update(result.peers_skip)
        steps = {step for _, step in result.skipped}
        skipped_odd += len({number + 1 for number in run.odd_batches} & steps)
    return Healthy(
        runs=len(found),
        steps=sum(result.steps_taken for _, result in found),
        odd_batches=sum(len(run.odd_batches) for run, _ in found),
        odd_batches_skipped=skipped_odd,
        false_skips=sum(
            outcomes.false_skips(result, odd_batches=run.odd_batches) for run, result in found
        ),
        false_acts=sum(outcomes.false_acts(result) for _, result in found),
        incidents=sum(len(result.causes) for _, result in found),
        alarms=dict(alarms),
        peers_skip=dict(peers),
        sick=sick,
    )


def page(half: str, steps: int, rows: Sequence[Row], healthy: Healthy, names: Sequence[str]) -> str:
    """The table in Markdown, with the sums below.

    Args:
        names: of the controls that were run.
    """
    head = ["family", "base", *names, "outcome", "extra", "delay", "last act", "named"]
    lines = [
        f"Half: {half}; {steps:,} steps a run; validation loss against the twin's.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * 2 + "|---:" * len(names) + "|---" + "|---:" * 2 + "|---|---|",
        *(_line(row, names) for row in rows),
        "",
        *_sums(rows, names),
        *_healthy_lines(healthy),
    ]
    return "\n".join(lines)


def _line(row: Row, names: Sequence[str]) -> str:
    outcome = row.outcomes.get(OURS, "")
    cells = [
        row.family if row.curable else f"{row.family} (not curable)",
        row.base,
        *(_percent(row.excess.get(name), row.outcomes.get(name, "")) for name in names),
        outcome if row.is_sick else f"{NOT_SICK} ({outcome})",
        "" if row.extra is None else f"{100 * row.extra:.1f} %",
        "" if row.delay is None else f"{row.delay}",
        row.rung,
        _in_short(row.named),
    ]
    return "| " + " | ".join(cells) + " |"


def _in_short(names: Sequence[str]) -> str:
    """Each name once, and how often it came."""
    counts = Counter(names)
    return ", ".join(name if n == 1 else f"{name} x{n}" for name, n in counts.items())


def _percent(excess: float | None, outcome: str) -> str:
    if excess is None:
        return ""
    if math.isfinite(excess):
        return f"{100 * excess:+.1f} %"
    return "stopped" if outcome in (outcomes.HANDED_OVER, outcomes.VAGUE) else "not finite"


def _sums(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    sick = [row for row in rows if row.is_sick]
    left_out = [f"{row.family} ({row.base})" for row in rows if not row.is_sick]
    curable = [row for row in sick if row.curable]
    kinds = len({row.kind for row in sick})
    lines = [f"{len(sick)} sick settings of {kinds} kinds, {len(curable)} of them curable."]
    if left_out:
        lines.append(f"Not sick when left alone, and not counted: {', '.join(left_out)}.")
    lines.append("")
    for name in names:
        counts = Counter(row.outcomes[name] for row in sick if name in row.outcomes)
        words = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
        done = sum(counts[outcome] for outcome in OUTCOMES)
        cured = [row.outcomes[name] == RESCUED for row in curable if name in row.outcomes]
        lines.append(
            f"{name}: {counts[RESCUED]} of {done} rescued ({words}); of the curable {sum(cured)} "
            f"of {len(cured)}"
        )
    judged = [row for row in sick if OURS in row.outcomes]
    if judged:
        lines.append(_aims(judged))
    rescued = [row for row in judged if row.outcomes[OURS] == RESCUED]
    extras = [row.extra for row in rescued if row.extra is not None]
    if extras:
        lines.append(
            f"extra tokens of the rescued: mean {100 * statistics.fmean(extras):.1f} %, most "
            f"{100 * max(extras):.1f} % (aims: {100 * EXTRA_MEAN:.0f} % and "
            f"{100 * EXTRA_MAX:.0f} %)"
        )
    delays = [row.delay for row in sick if row.delay is not None]
    if delays:
        lines.append(f"steps from onset to the first act: median {statistics.median(delays):g}")
    early_acts = sum(row.false_acts for row in rows)
    early_skips = sum(row.false_skips for row in rows)
    lines.append(f"before the onset: {early_acts} acts, {early_skips} steps left out")
    return lines


def _aims(judged: Sequence[Row]) -> str:
    """Whoever is stopped without the right cause is lost."""
    became = [row.outcomes[OURS] for row in judged]
    curable = [row.outcomes[OURS] == RESCUED for row in judged if row.curable]
    lost = sum(outcome in (outcomes.LOST, outcomes.VAGUE) for outcome in became)
    saved = f"{100 * statistics.fmean(curable):.0f} %" if curable else "none there"
    return (
        f"aims: of the curable {saved} rescued (at least {100 * CURED_LEAST:.0f} %), of all "
        f"{100 * lost / len(became):.0f} % lost (at most {100 * LOST_MOST:.0f} %)"
    )


def _healthy_lines(healthy: Healthy) -> list[str]:
    if not healthy.runs:
        return []
    alarms = ", ".join(f"{name} {count}" for name, count in (healthy.alarms or {}).items())
    peers = ", ".join(f"{name} {count}" for name, count in (healthy.peers_skip or {}).items())
    return [
        f"healthy: {healthy.false_acts} false acts and {healthy.false_skips} false skips in "
        f"{healthy.steps:,} steps of {healthy.runs} runs" + (f" ({alarms})" if alarms else ""),
        f"ranks that ended there: {healthy.incidents}",
        f"odd batches among them: {healthy.odd_batches}, {healthy.odd_batches_skipped} left out",
        f"the peers' rules on the same curves would have stepped in: {peers}",
        *(
            f"thought healthy, {name}: left alone it ends {100 * worse:+.1f} % from ours"
            for name, worse in (healthy.sick or {}).items()
        ),
    ]


def as_json(half: str, steps: int, rows: Sequence[Row], healthy: Healthy) -> dict[str, Any]:
    """The same for programs; None stands for what is not finite."""
    payload = [asdict(row) for row in rows]
    for row in payload:
        row["excess"] = {
            name: value if math.isfinite(value) else None for name, value in row["excess"].items()
        }
    return {"half": half, "steps": steps, "rows": payload, "healthy": asdict(healthy)}
