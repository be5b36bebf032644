"""The rules of the house that a program can count: lines, comments, names, folders, rooms."""

import ast
import io
import keyword
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "opt_train", ROOT / "logbook" / "opt_logbook")
COLUMNS = 100

SPEECH = {"tell", "tells", "told", "telling", "say", "says", "said", "saying"}
SPEECH |= {"hear", "hears", "heard", "hearing"}
"""Words that have seven meanings each where programs talk: name what is sent, published, read."""

SPEECH_ALLOWED = 60


@cache
def sources() -> dict[Path, str]:
    """Every Python file of the product and its text."""
    return {path: path.read_text() for package in PACKAGES for path in package.rglob("*.py")}


@cache
def tokens_of(path: Path) -> tuple[tokenize.TokenInfo, ...]:
    return tuple(tokenize.generate_tokens(io.StringIO(path.read_text()).readline))


def python_files() -> Iterator[Path]:
    for folder in ("opt_train", "logbook", "tests", "benchmarks", "docs"):
        yield from (ROOT / folder).rglob("*.py")


def parts_of(name: str) -> set[str]:
    """`tell_before`, `TellsLayers` -> the words in them, in small letters."""
    words = (word for part in name.split("_") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", part))
    return {word.lower() for word in words}


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines; of a document those outside fences, where output stands as it is."""
    fenced = False
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fence = path.suffix == ".md" and line.lstrip().startswith("```")
        fenced ^= fence
        # A row of a table cannot be broken, nor an address.
        if not (fenced or (path.suffix == ".md" and line.startswith("|")) or "://" in line):
            yield number, line


def test_no_line_is_longer_than_100_columns() -> None:
    files = [*python_files(), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    files += [*(ROOT / "launch").iterdir()]
    assert not [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in lines_of(path)
        if len(line) > COLUMNS
    ]


def test_comments_say_why_often_enough() -> None:
    """3 % of the lines: a reader who has not seen the code stops somewhere every thirty lines."""
    lines = sum(len(text.splitlines()) for text in sources().values())
    comments = {
        (path, token.start[0])
        for path in sources()
        for token in tokens_of(path)
        if token.type == tokenize.COMMENT
        and not re.match(r"#\s*(noqa|type:)|# .* -{5,}$", token.string)
    }
    assert len(comments) / lines >= 0.03


def test_no_conditional_expression_stands_in_another() -> None:
    nested = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, text in sources().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.IfExp)
        and any(isinstance(part, ast.IfExp) for part in (node.test, node.body, node.orelse))
    ]
    assert not nested


def test_identifiers_do_not_speak() -> None:
    found = Counter(
        token.string
        for path in sources()
        for token in tokens_of(path)
        if token.type == tokenize.NAME
        and not keyword.iskeyword(token.string)
        and parts_of(token.string) & SPEECH
    )
    assert sum(found.values()) < SPEECH_ALLOWED, found.most_common()


def test_a_class_name_has_one_meaning() -> None:
    classes = Counter(
        node.name
        for text in sources().values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_no_file_is_formatted_by_hand() -> None:
    packed = re.compile(r"#\s*fmt:\s*(skip|off)")
    assert not [
        path
        for path in python_files()
        if packed.search(path.read_text()) and path != Path(__file__)
    ]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_no_folder_holds_more_than_24_files(package: Path) -> None:
    folders = [package, *(path for path in package.rglob("*") if path.is_dir())]
    counts = {
        str(folder.relative_to(ROOT)): sum(path.suffix == ".py" for path in folder.iterdir())
        for folder in folders
        if folder.name != "__pycache__"
    }
    assert {folder: count for folder, count in counts.items() if count > 24} == {}


def test_no_room_is_larger_than_a_sixth_of_the_house() -> None:
    lines: Counter[str] = Counter()
    for path, text in sources().items():
        lines[path.relative_to(ROOT).parts[1]] += len(text.splitlines())
    whole = sum(lines.values())
    shares = {room: count / whole for room, count in lines.items() if room != "opt_logbook"}
    assert {room: share for room, share in shares.items() if share > 0.16} == {}


def test_rooms_open_with_empty_files() -> None:
    """What `__init__.py` does happens to everybody who only wanted a neighbour."""
    assert not [path for path in sources() if path.name == "__init__.py" and path.read_text()]
