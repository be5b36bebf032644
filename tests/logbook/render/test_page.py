"""Nothing that a log says may become part of the page, and the page needs nothing but itself."""

import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from opt_logbook.record.events import Evidence, FailureSeen, IncidentDiagnosed, Note, Unknown
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.render.markdown import escaped, fenced
from opt_logbook.render.plots import thinned
from opt_logbook.render.render import render

from tests.logbook.demo_run import NODES, DemoRun

HOSTILE = (
    "</pre></style></title></svg><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "![cute](https://example.com/track.png) [click](javascript:alert(1))",
    "```\n# Owned\n<script>alert(2)</script>\n```",
    "`a` **bold** _it_ <b>b</b> &lt;b&gt; | cell | ~~gone~~ https://example.com",
    "\x1b[31mred\x1b[0m \u202egnp.exe \x00 \x07",
    "{title} %s {body} ${x}",
    "lone \udcff surrogate",
)


class Elements(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def hostile_run(path: Path) -> RunDirectory:
    demo = DemoRun(path)
    demo.create(name=HOSTILE[0])
    demo.start("1.00", 0, (*NODES, HOSTILE[1]), (), reason=HOSTILE[3], difference=HOSTILE)
    demo.train(2, 60)
    for number, text in enumerate(HOSTILE, 1):
        demo.append(FailureSeen(number, 1, text, 0, text), 60)
        evidence = (
            Evidence(text, 1, text),
            Evidence("javascript:alert(1)", 2, text),
            Evidence("../../x", 3, text),
        )
        demo.append(IncidentDiagnosed(number, text, text, text, 0.5, text, 0, evidence, text), 60)
        demo.append(Note(text, text))
        demo.append(Unknown(text, {text: text}))
    return demo.close()


def test_log_text_never_becomes_markup_of_the_page(tmp_path: Path, demo: RunDirectory) -> None:
    page = render(hostile_run(tmp_path / "hostile")).page.read_text()
    elements = Elements(page)
    assert not {"script", "img", "iframe", "object", "link"} & set(elements.tags)
    assert set(elements.tags) <= set(Elements(render(demo).page.read_text()).tags) | {
        "article",
        "p",
    }
    assert not [name for _, name, _ in elements.attributes if name.startswith("on")]
    for _, name, value in elements.attributes:
        if name in ("href", "xlink:href", "src"):
            assert re.match(r"#|\.\./[A-Za-z0-9%]", value), value
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_log_text_never_becomes_markup_of_the_markdown(tmp_path: Path) -> None:
    text = render(hostile_run(tmp_path / "hostile")).markdown.read_text()
    outside: list[str] = []
    fence = ""
    for line in text.splitlines():
        ticks = re.match(r"`{3,}", line)
        if not fence and ticks:
            fence = ticks[0]
        elif fence and line.rstrip() == fence:
            fence = ""
        elif not fence:
            outside.append(line)
    assert fence == "", "every fence that was opened is closed"
    assert not [line for line in outside if re.search(r"(?<!\\)<(?!!)", line)]
    assert not [line for line in outside if re.search(r"(?<!\\)\]\((?!figures/)", line)]
    assert not [line for line in outside if line.startswith("# ") and "Chronicle" not in line]
    assert not [line for line in outside if "https://" in line]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("node_failure on node-2", "node_failure on node-2"),
        ("_emphasis_ *strong*", r"\_emphasis\_ \*strong\*"),
        ("1. no list", r"1\. no list"),
        ("- no list", r"\- no list"),
        ("# no heading", r"\# no heading"),
        ("[a](b) ![c](d) <e> `f` g|h", r"\[a\](b) !\[c\](d) \<e\> \`f\` g\|h"),
        ("two\nlines", "two lines"),
    ],
)
def test_markdown_is_escaped_where_it_would_mean_something(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_a_fence_is_longer_than_any_in_the_text() -> None:
    assert fenced("a ```` b").startswith("`````text\n")


def test_the_page_is_one_file_without_script_that_fetches_nothing(demo: RunDirectory) -> None:
    page = render(demo).page.read_text()
    elements = Elements(page)
    assert elements.tags["script"] == 0
    assert elements.tags["svg"] == 3
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    # Names of XML vocabularies, which nobody fetches.
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_no_two_elements_of_the_page_share_an_id_and_every_link_arrives(demo: RunDirectory) -> None:
    elements = Elements(render(demo).page.read_text())
    ids = Counter(value for _, name, value in elements.attributes if name == "id")
    assert [name for name, count in ids.items() if count > 1] == []
    targets = {
        value[1:]
        for _, name, value in elements.attributes
        if "href" in name and value.startswith("#")
    }
    assert targets <= set(ids)


def test_figures_are_well_formed_and_carry_no_date(demo: RunDirectory) -> None:
    for figure in render(demo).figures:
        ElementTree.fromstring(figure.read_text())
        assert "dc:date" not in figure.read_text()


def test_thinning_a_long_curve_keeps_its_spikes() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    kept = thinned(points, 1500)
    assert len(kept) <= 1500
    assert (77_777.0, 9.0) in kept
    assert kept == sorted(kept)


def test_thinning_keeps_both_ends_and_the_gap_of_a_loss_that_was_no_number() -> None:
    points = [(float(step), float(step % 7)) for step in range(100_000)]
    points[50_001] = (50_001.0, math.nan)
    kept = thinned(points, 1500)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert sum(math.isnan(up) for _, up in kept) == 1
    assert [across for across, _ in kept] == sorted(across for across, _ in kept)
