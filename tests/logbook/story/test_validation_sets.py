"""Several validation sets in one chronicle: each has its own curve and sentence, and none passes
for another."""

import math
import re
from pathlib import Path

from opt_logbook.record.events import HELD_OUT, ValidationMeasured
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.render.plots import ATTEMPT_COLOURS, FAINT, SETS_DRAWN_MAX
from opt_logbook.render.render import render

from tests.logbook.demo_run import NODES, DemoRun, write_demo

CURVE = re.compile(rf'<path d="([^"]*)"[^>]*stroke: {FAINT}; stroke-width: 0\.9')


def measured(path: Path, *sets: str, times: int = 5) -> DemoRun:
    """A run that measured set number n as 10 times n + 1 at step 10, and a tenth more at each
    further step."""
    demo = DemoRun(path)
    demo.create()
    demo.start("1.00", 0, NODES, (), reason="the run begins")
    for step in range(10, 10 * (times + 1), 10):
        for number, name in enumerate(sets):
            perplexity = 10 * (number + 1) * (1 + 0.01 * (step - 10))
            demo.append(
                ValidationMeasured(name, math.log(perplexity), perplexity, 640), step, seconds=0.2
            )
    return demo


def panels(run: RunDirectory) -> list[str]:
    """The figure's SVG, cut into its axes."""
    svg = (run.chronicle / "figures" / "validation.svg").read_text()
    return re.split(r'<g id="axes_\d+">', svg)[1:]


def heights(panel: str) -> list[float]:
    [curve] = CURVE.findall(panel)
    return [float(y) for y in re.findall(r"[ML] \S+ (\S+)", curve)]


def test_two_sets_are_never_one_curve(tmp_path: Path) -> None:
    """Their perplexities alternate in the journal: one curve through all of them would be a saw."""
    run = measured(tmp_path / "demo", "web", HELD_OUT, "code").run
    render(run)
    drawn = panels(run)
    assert len(drawn) == 3
    for panel in drawn:
        found = heights(panel)
        assert len(found) == 5
        assert found == sorted(found, reverse=True), "each grows, and an SVG's y points down"
        assert panel.count(f"fill: {ATTEMPT_COLOURS[0]}") >= 5, "and has its attempt's points"
    assert ["validation perplexity" in panel for panel in drawn] == [True, False, False]
    assert [re.findall(">(web|code)<", panel) for panel in drawn] == [[], ["code"], ["web"]]
    assert ["unigram model" in panel for panel in drawn] == [True, False, False], (
        "it is of the held-out text"
    )


def test_each_set_has_its_row_and_its_sentence(tmp_path: Path) -> None:
    run = measured(tmp_path / "demo", "web", HELD_OUT).run
    chronicle = render(run).chronicle
    card = {name: sentence for name, sentence in chronicle.card if "erplexity" in name}
    assert list(card) == ["Validation perplexity", "Perplexity on web"]
    assert card["Perplexity on web"].text == "14.0 at step 50"
    assert card["Validation perplexity"].text.startswith("28.0 at step 50; unigram model 702.4")
    lines_of = {
        one.text: one.lines for one in chronicle.entries[0].sentences if "erplexity" in one.text
    }
    assert list(lines_of) == [
        "Validation perplexity 20.0 at step 10, 22.0 at step 20, 24.0 at step 30, 26.0 at step 40 "
        "and 28.0 at step 50.",
        "Perplexity on web: 10.0 at step 10, 11.0 at step 20, 12.0 at step 30, 13.0 at step 40 "
        "and 14.0 at step 50.",
    ]
    held, web = lines_of.values()
    assert not set(held) & set(web)
    lines = run.journal.read_text().splitlines()
    assert all('"name":"web"' in lines[number - 1] for number in web)


def test_a_run_without_named_sets_has_the_figure_it_had(tmp_path: Path) -> None:
    run = write_demo(tmp_path / "demo")
    render(run)
    [panel] = panels(run)
    assert "unigram model 702.4" in panel
    assert 'height="201.6pt"' in (run.chronicle / "figures" / "validation.svg").read_text()


def test_a_set_s_name_is_text_and_neither_mathematics_nor_markup(tmp_path: Path) -> None:
    """Names come from a journal: `$` opens a formula in matplotlib, and one that does not parse
    raises."""
    names = ("$\\bad{", "<script>alert(1)</script>", "web | a\x1b[31m")
    run = measured(tmp_path / "demo", *names).run
    page = render(run).page.read_text()
    assert len(panels(run)) == 3
    assert "<script" not in page
    assert "$\\bad{" in page
    assert "web \\| a" in (run.chronicle / "chronicle.md").read_text()


def test_a_hundred_names_make_no_endless_figure(tmp_path: Path) -> None:
    # Each line of a journal waits for the disk.
    names = (f"set-{number:03d}" for number in range(100))
    run = measured(tmp_path / "demo", *names, times=2).run
    render(run)
    drawn = panels(run)
    assert len(drawn) == SETS_DRAWN_MAX
    assert "sets not drawn: 88" in drawn[-1]
