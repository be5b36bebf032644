"""The chronicle's figures as SVG: the same bytes for the same run, drawn without a display and
without pyplot.

Colours that belong to the page (ink, grid) are drawn as fixed values that `page` exchanges for its
own, so a figure is legible in the light and in the dark.
"""

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from opt_logbook.record import metrics
from opt_logbook.record.events import HELD_OUT, ValidationMeasured
from opt_logbook.story.format import moment, printable
from opt_logbook.story.records import IncidentRecord, Recorded, Story, by_set

INK, FAINT, GRID, ALARM = "#22272e", "#68717c", "#d9dde2", "#c03a2b"
ATTEMPT_COLOURS = ("#3273c8", "#d07a1f", "#2a9387", "#8a5cc0", "#7f8f1f", "#b0567f", "#9a6b3f")
POINTS_MAX = 6000
"""Points drawn of one quantity in all; beyond that each stretch is drawn by its smallest and
largest value."""

MARKS_MAX = 15
"""More incidents than these are marked by a short tick without a number."""

SETS_DRAWN_MAX = 12
"""Of more validation sets than these the others are in the logbook's entries alone."""

STEPS_MAX = 10**15
"""A damaged line may hold a step of hundreds of digits, which no axis can show."""

_STYLE = {
    # Text stays text. It is measured with DejaVu Sans, which comes with matplotlib, so the layout
    # does not depend on the fonts of the machine.
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

Points = list[tuple[float, float]]


@dataclass(slots=True)
class AttemptLines:
    """An attempt's metrics lines, by whether the newest state has their work."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)


def draw(story: Story) -> dict[str, str]:
    """The figures that the run has data for: name to SVG text (`steps`, `wall_clock`,
    `validation`)."""
    drawn: dict[str, str] = {}
    parts = _lines_by_attempt(story)
    # Metrics without any attempt (the journal is missing or all damaged) belong to no curve.
    if parts and any(metrics.number_of(line, "loss") is not None for line in story.measured.lines):
        drawn["steps"] = _svg("steps", (7.2, 6.4), lambda figure: _draw_steps(figure, story, parts))
        drawn["wall_clock"] = _svg(
            "wall_clock", (7.2, 3.1), lambda figure: _draw_wall_clock(figure, story, parts)
        )
    if sets := len(_validated(story)):
        height = 2.8 if sets == 1 else 1.2 + 1.6 * min(sets, SETS_DRAWN_MAX)
        drawn["validation"] = _svg(
            "validation", (7.2, height), lambda figure: _draw_validation(figure, story)
        )
    return drawn


def colour_of(index: int) -> str:
    """The colour of the attempt at `index` of the run's attempts, in every figure and in the
    page."""
    return ATTEMPT_COLOURS[index % len(ATTEMPT_COLOURS)]


def _svg(name: str, inches: tuple[float, float], paint: Callable[[Figure], None]) -> str:
    with mpl.rc_context():
        # A person's matplotlibrc must not change a byte.
        mpl.rcdefaults()
        settings: Any = mpl.rcParams
        # Without a salt the ids of clip paths are drawn at random.
        settings.update(_STYLE | {"svg.hashsalt": name})
        # pyplot would choose a backend by the display, and keep every figure alive.
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        text = io.StringIO()
        # Otherwise the file holds the time of its drawing and matplotlib's version (invariant 12).
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


# Figures ------------------------------------------------------------------------------------------


def _draw_steps(figure: Figure, story: Story, parts: list[AttemptLines]) -> None:
    panels = (
        ("loss", "training loss\n(nats a token)"),
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
    )
    all_axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=(2, 1, 1))
    for axes, (key, label) in zip(all_axes, panels, strict=True):
        for index, part in enumerate(parts):
            _curves(axes, part, index, POINTS_MAX // len(parts), "step", key)
        axes.set_ylabel(label)
        _mark_steps(axes, story.incidents)
    all_axes[-1].set_xlabel("step")
    all_axes[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _legend(all_axes[0], story)
    figure.align_ylabels()


def _draw_wall_clock(figure: Figure, story: Story, parts: list[AttemptLines]) -> None:
    axes = figure.subplots()
    begin = (
        story.created.time if story.created else min(attempt.since for attempt in story.attempts)
    )
    unit, seconds = _unit(story.until - begin)
    for index, part in enumerate(parts):
        _curves(
            axes,
            part,
            index,
            POINTS_MAX // len(parts),
            "time",
            "loss",
            lambda time: (time - begin) / seconds,
        )
    for incident in story.incidents:
        if not incident.seen:
            continue
        fell = (incident.seen[0].time - begin) / seconds
        back = (_back_at(incident, story) - begin) / seconds
        axes.axvspan(fell, max(back, fell), color=ALARM, alpha=0.16, linewidth=0)
        _mark(axes, fell, incident.number, len(story.incidents))
    axes.set_ylabel("training loss\n(nats a token)")
    axes.set_xlabel(f"{unit} since {moment(begin)}")
    _legend(axes, story)


def _draw_validation(figure: Figure, story: Story) -> None:
    """A panel for each set: perplexities of different texts have no common scale."""
    sets = _validated(story)
    drawn = list(sets.items())[:SETS_DRAWN_MAX]
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, measured) in zip(panels, drawn, strict=True):
        _draw_set(axes, story, name, measured)
    panels[-1].set_xlim(left=0)
    left_out = f" (sets not drawn: {len(sets) - len(drawn):,})" if len(sets) > len(drawn) else ""
    panels[-1].set_xlabel(f"step{left_out}")
    _legend(panels[0], story, incidents=False)


def _validated(story: Story) -> dict[str, list[Recorded[ValidationMeasured]]]:
    return by_set(measured for attempt in story.attempts for measured in attempt.validated)


def _draw_set(
    axes: Axes, story: Story, name: str, measured: list[Recorded[ValidationMeasured]]
) -> None:
    everything = [
        (float(point.step or 0), point.event.perplexity)
        for point in measured
        if (point.step or 0) < STEPS_MAX
    ]
    axes.plot(*_columns(sorted(dict(everything).items())), color=FAINT, linewidth=0.9)
    for index, attempt in enumerate(story.attempts):
        points = [
            (float(point.step or 0), point.event.perplexity)
            for point in attempt.validated
            if point.event.name == name
            and 0 < point.event.perplexity < math.inf
            and (point.step or 0) < STEPS_MAX
        ]
        if points:
            axes.plot(
                *_columns(points),
                color=colour_of(index),
                marker="o",
                markersize=5,
                linestyle="none",
            )
    # Perplexity is exp(loss): on this scale equal distances are equal differences of loss.
    axes.set_yscale("log")
    unigram = story.created.event.unigram_perplexity if story.created and name == HELD_OUT else 0.0
    if unigram > 0:
        axes.axhline(unigram, color=FAINT, linestyle=(0, (5, 3)), linewidth=1)
        axes.annotate(
            f"unigram model {unigram:.1f}",
            (1, unigram),
            xycoords=("axes fraction", "data"),
            xytext=(-4, -12),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=FAINT,
        )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else ""
    )
    axes.set_ylabel("validation perplexity" if name == HELD_OUT else "perplexity")
    if name != HELD_OUT:
        # A name between dollar signs would be set as a formula, and a broken formula raises.
        axes.set_title(printable(name), loc="left", fontsize=9, parse_math=False)


# Pieces -------------------------------------------------------------------------------------------


def _curves(
    axes: Axes,
    part: AttemptLines,
    index: int,
    most: int,
    x: str,
    y: str,
    across: Callable[[float], float] = lambda value: value,
) -> None:
    """One attempt's curve: its steps whose work was lost are pale."""
    # The pale part begins where the other ends, so that no gap shows where there was none.
    for lines, alpha in ((part.kept[-1:] + part.lost, 0.38), (part.kept, 1.0)):
        points = [(across(right), up) for right, up in _pairs(lines, x, y)]
        if len(points) > 1 or lines is part.kept:
            axes.plot(*_columns(thinned(points, most)), color=colour_of(index), alpha=alpha)


def _lines_by_attempt(story: Story) -> list[AttemptLines]:
    """One for each attempt, in one pass over what may be hundreds of thousands of lines."""
    kept = {(line["attempt"], line["step"]) for line in story.kept}
    parts = {attempt.name: AttemptLines() for attempt in story.attempts}
    for line in story.measured.lines:
        part = parts.get(line["attempt"])
        if part is not None:
            (part.kept if (line["attempt"], line["step"]) in kept else part.lost).append(line)
    return [parts[attempt.name] for attempt in story.attempts]


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _pairs(lines: Iterable[dict[str, Any]], x: str, y: str) -> Iterable[tuple[float, float]]:
    for line in lines:
        across, up = metrics.number_of(line, x), metrics.number_of(line, y)
        if up is None and metrics.is_not_finite(line, y):
            up = math.nan  # which breaks the curve
        if across is not None and up is not None:
            yield across, up


def thinned(points: Points, most: int) -> Points:
    """`points` with at most about `most` left: both ends, and of each stretch the smallest and the
    largest, so no spike is lost, and the first that is no number, so no gap is."""
    if len(points) <= most:
        return points
    stretch = -(-len(points) * 2 // max(most - 2, 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        finite = [index for index in part if not math.isnan(points[index][1])]
        if finite:
            kept |= {
                min(finite, key=lambda i: points[i][1]),
                max(finite, key=lambda i: points[i][1]),
            }
        if len(finite) < len(part):
            kept.add(next(index for index in part if math.isnan(points[index][1])))
    return [points[index] for index in sorted(kept)]


def _mark_steps(axes: Axes, incidents: list[IncidentRecord]) -> None:
    for incident in incidents:
        step = incident.seen[0].step if incident.seen else None
        if step is not None and step < STEPS_MAX:
            _mark(axes, float(step), incident.number, len(incidents))


def _mark(axes: Axes, x: float, number: int, of: int) -> None:
    if of > MARKS_MAX:
        axes.axvline(x, 0.95, 1, color=ALARM, linewidth=0.7)
        return
    axes.axvline(x, color=ALARM, linewidth=0.9, linestyle=(0, (2, 2)))
    axes.annotate(
        str(number),
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -9),
        textcoords="offset points",
        color=ALARM,
        fontsize=8.5,
        fontweight="bold",
    )


def _legend(axes: Axes, story: Story, incidents: bool = True) -> None:
    # With more attempts than colours a legend says nothing; the contents show each one's colour.
    shown = story.attempts if len(story.attempts) <= len(ATTEMPT_COLOURS) else []
    handles = [
        mpl.lines.Line2D([], [], color=colour_of(index), label=attempt.name)
        for index, attempt in enumerate(shown)
    ]
    if story.incidents and incidents:
        handles.append(
            mpl.lines.Line2D(
                [], [], color=ALARM, linestyle=(0, (2, 2)), linewidth=0.9, label="incident"
            )
        )
    if not handles:
        return
    # Above the axes, where it hides neither curves nor incident numbers.
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(handles),
        borderaxespad=0.2,
    )


def _back_at(incident: IncidentRecord, story: Story) -> float:
    """When training went on after the incident: the first step of an attempt that followed; else
    the newest time."""
    for attempt in story.attempts:
        if attempt.began and attempt.began.time >= incident.seen[0].time:
            return attempt.began.time
    return story.until


def _unit(seconds: float) -> tuple[str, float]:
    for name, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 3 * size:
            return name, size
    return "seconds", 1.0
