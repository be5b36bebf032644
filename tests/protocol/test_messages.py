"""Every message arrives as it was sent, and a line that is none of ours is a `ProtocolError`: never
another exception, which would end the agent or the supervisor that reads it."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_train.config.run_config import RunConfig
from opt_train.optim.config import OptimConfig
from opt_train.optim.in_force import in_force
from opt_train.protocol import commands, facts, orders
from opt_train.protocol.facts import (
    FACTS_OF_A_RANK,
    ExitNotice,
    InForce,
    Metrics,
    NumberedFact,
    RankFact,
    SavedFile,
    ShardsSaved,
)
from opt_train.protocol.framing import (
    MAX_DEPTH,
    MAX_FACT_BYTES,
    Message,
    ProtocolError,
    from_line,
    parse,
    to_line,
)
from opt_train.train.config import TrainConfig

CLASSES = [
    kind for kind in Message.registry.values() if kind.__module__.startswith("opt_train.protocol.")
]
ABSTRACT = {Message, commands.Command, orders.Order, orders.UnknownOrder}
"""Without a kind: they are never sent."""

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def values_of(hint: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """Whatever a field of type `hint` may hold."""
    arguments = getattr(hint, "__args__", ())
    origin = getattr(hint, "__origin__", None)
    simple = {int: st.integers(), str: TEXT, bool: st.booleans(), float: st.floats()}
    if hint in simple:
        return simple[hint]
    if origin is tuple:
        return st.lists(values_of(arguments[0], depth), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(TEXT, PLAIN, max_size=4)
    if hint in ABSTRACT:
        # A message in a message in a message; the innermost is one that holds no other.
        flat = [c for c in CLASSES if not ABSTRACT & set(get_type_hints(c).values())]
        inner = [c for c in (CLASSES if depth < 2 else flat) if issubclass(c, hint)]
        return st.sampled_from(inner).flatmap(lambda kind: messages(kind, depth + 1))
    if dataclasses.is_dataclass(hint):
        return messages(hint, depth)
    assert type(None) in arguments, f"no strategy for {hint}"
    return st.none() | values_of(next(a for a in arguments if a is not type(None)), depth)


def messages(kind: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    return st.builds(
        kind, **{f.name: values_of(hints[f.name], depth) for f in dataclasses.fields(kind)}
    )


def test_the_table_of_contents_is_complete() -> None:
    """A class that is not in the registry can be sent and never be read."""
    for module in (facts, commands, orders):
        written = {
            c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Message)
        } - ABSTRACT
        assert written <= set(CLASSES)
    assert {Message.registry[c.kind] for c in CLASSES} == set(CLASSES)
    assert set(FACTS_OF_A_RANK) < set(CLASSES)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.kind)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_message_arrives_as_it_was_sent(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    line = to_line(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    arrived = from_line(line)
    assert type(arrived) is kind
    # By their representation: a NaN is not equal to itself, and -0.0 equals 0.0.
    assert repr(arrived) == repr(message)
    assert to_line(arrived) == line


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.kind)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_message_cannot_be_changed_nor_carry_more_than_its_fields(
    kind: type[Message], data: st.DataObject
) -> None:
    message = data.draw(messages(kind))
    assert not hasattr(message, "__dict__")
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, field.name, getattr(message, field.name))


# What is not a number, a line, or a character -----------------------------------------------------


@pytest.mark.parametrize(
    ("value", "word"),
    [(math.nan, b'"NaN"'), (math.inf, b'"Infinity"'), (-math.inf, b'"-Infinity"')],
)
def test_a_number_that_is_not_finite_travels_as_a_word(value: float, word: bytes) -> None:
    """A loss of NaN is the very step that must not get lost on the way."""
    validation = facts.Validation("validation", 3, value, 7)
    assert b'"loss":' + word in to_line(validation)
    arrived = from_line(to_line(validation))
    assert isinstance(arrived, facts.Validation)
    assert repr(arrived.loss) == repr(value)
    metrics = from_line(to_line(Metrics({"loss": value, "norms": [value]})))
    assert isinstance(metrics, Metrics)
    assert repr(float(metrics.line["loss"])) == repr(float(metrics.line["norms"][0])) == repr(value)
    json.loads(to_line(validation), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "text",
    [
        "a\nb",
        "\r\n",
        "\u2028\u2029\x85\x0b\x0c\x1c",
        "\0",
        "\ud800",
        "x\udfff\ud800y",
        "é\U0001f4a5",
    ],
)
def test_any_text_stays_on_one_line(text: str) -> None:
    """A log line with a stray byte is evidence; it must neither tear the line nor stop the
    agent."""
    told = NumberedFact(
        1,
        facts.RankExited(
            1, 0, 0, 9, 1, None, False, None, "step", 3, (facts.LogLine("log", 1, text),)
        ),
    )
    line = to_line(told)
    assert line.index(b"\n") == len(line) - 1
    arrived = from_line(line)
    assert isinstance(arrived, NumberedFact)
    assert isinstance(arrived.fact, facts.RankExited)
    assert arrived.fact.log_tail[0].text == text.encode("utf-8", "replace").decode()


def test_a_surrogate_from_outside_is_told_on() -> None:
    """JSON can spell half a character; an agent that relays the fact has to write it again."""
    arrived = from_line(b'{"kind":"leave","reason":"\\ud800"}')
    assert from_line(to_line(arrived)) == commands.Leave("?")


# What is no message -------------------------------------------------------------------------------

PHASE = {"kind": "phase", "phase": "step", "step": 3}
EXITED = {
    "kind": "rank_exited",
    "generation": 1,
    "rank": 0,
    "slot": 0,
    "pid": 5,
    "code": 1,
    "signal": None,
    "killed_by_agent": False,
    "leaving": None,
    "phase": "step",
    "step": 3,
    "log_tail": [],
}
HUGE = "9" * 400

NO_MESSAGES: dict[str, Any] = {
    "nothing": b"",
    "a blank line": b" \n",
    "not JSON": b"Traceback (most recent call last):",
    "half a line": to_line(facts.Phase("step", 3))[:-5],
    "two on a line": to_line(facts.Progress(1, 2)).strip() * 2,
    "bytes that are no UTF-8": b'{"kind":"leave","reason":"\xff"}',
    "UTF-16": json.dumps(PHASE).encode("utf-16"),
    "a bare NaN": b'{"kind":"validation","name":"v","step":1,"loss":NaN,"tokens":1}',
    "a number of too many digits": b'{"kind":"progress","done":1,"total":' + b"9" * 5000 + b"}",
    "a list": [1],
    "a number": 3,
    "null": None,
    "a text": "phase",
    "no kind": {"phase": "step", "step": 3},
    "a kind unknown": PHASE | {"kind": "phaze"},
    "a kind that is no text": PHASE | {"kind": ["phase"]},
    "the kind of no message": PHASE | {"kind": ""},
    "a field missing": {"kind": "phase", "phase": "step"},
    "all fields missing": {"kind": "begin"},
    "a field too many": PHASE | {"color": "red"},
    "a field of the class's own": PHASE | {"registry": {}},
    "a text for a number": PHASE | {"step": "3"},
    "a fraction for a whole number": PHASE | {"step": 3.0},
    "true for a whole number": PHASE | {"step": True},
    "null for a whole number": PHASE | {"step": None},
    "a number for a text": PHASE | {"phase": 3},
    "a number for a yes or no": EXITED | {"killed_by_agent": 0},
    "a text for a fraction": {"kind": "warm", "pid": 1, "import_seconds": "1.5"},
    "another word for NaN": {"kind": "warm", "pid": 1, "import_seconds": "nan"},
    "true for a fraction": {"kind": "warm", "pid": 1, "import_seconds": True},
    "null for a fraction": {"kind": "warm", "pid": 1, "import_seconds": None},
    "no double holds it": f'{{"kind":"warm","pid":1,"import_seconds":{HUGE}}}'.encode(),
    "a list for a mapping": {"kind": "metrics", "line": [["step", 1]]},
    "a number for a mapping": {"kind": "in_force", "values": 3},
    "null for a mapping": {"kind": "in_force", "values": None},
    "a mapping for a list": EXITED | {"log_tail": {}},
    "a text for a list": EXITED | {"log_tail": "abc"},
    "a number for a list": EXITED | {"log_tail": 3},
    "numbers in a list of lines": EXITED | {"log_tail": [3]},
    "a line without its text": EXITED | {"log_tail": [{"file": "log", "line": 1}]},
    "a line with too much": EXITED
    | {"log_tail": [{"file": "log", "line": 1, "text": "", "color": "red"}]},
    "a line number as text": EXITED | {"log_tail": [{"file": "log", "line": "1", "text": ""}]},
    "a text for what may be null": EXITED | {"code": "1"},
    "another message for a last word": EXITED | {"leaving": PHASE},
    "a last word without its kind": EXITED | {"leaving": {"code": 0, "step": 1, "reason": ""}},
    "a number for a message": {"kind": "told", "number": 1, "fact": 3},
    "null for a message": {"kind": "relay", "generation": 1, "order": None},
    "a message that is none within": {"kind": "told", "number": 1, "fact": PHASE | {"step": "3"}},
    "none two levels within": {
        "kind": "told",
        "number": 1,
        "fact": {
            "kind": "rank_fact",
            "generation": 1,
            "attempt": "1.00",
            "rank": 0,
            "fact": {"kind": "?"},
        },
    },
}


@pytest.mark.parametrize("name", NO_MESSAGES)
def test_what_is_no_message_is_refused_and_nothing_else_happens(name: str) -> None:
    given_line = NO_MESSAGES[name]
    line = given_line if isinstance(given_line, bytes) else json.dumps(given_line).encode()
    with pytest.raises(ProtocolError) as refused:
        from_line(line)
    assert "\n" not in str(refused.value), "it goes into a log"


def test_the_samples_above_are_wrong_in_one_thing_only() -> None:
    """Otherwise they would be refused for another reason than the one they name."""
    assert from_line(json.dumps(PHASE).encode()) == facts.Phase("step", 3)
    line = {"file": "log", "line": 1, "text": ""}
    last = {"kind": "leaving", "code": 0, "step": 1, "reason": ""}
    arrived = from_line(json.dumps(EXITED | {"log_tail": [line], "leaving": last}).encode())
    assert isinstance(arrived, facts.RankExited)
    assert (arrived.log_tail, arrived.leaving) == (
        (facts.LogLine("log", 1, ""),),
        ExitNotice(0, 1, ""),
    )
    assert from_line(b'{"kind":"warm","pid":1,"import_seconds":2}') == facts.Warm(1, 2.0)


def nested_lines(depth: int) -> Iterator[bytes]:
    """Lines that nest `depth` deep, each in another way."""
    yield b'{"kind":"in_force","values":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
    yield b'{"kind":"metrics","line":{"a":' + b"[" * depth + b"]" * depth + b"}}"
    yield (
        b'{"kind":"told","number":1,"fact":' * depth + b'{"kind":"lead","leader":1}' + b"}" * depth
    )
    yield b'{"kind":"relay","generation":1,"order":' * depth + b"3" + b"}" * depth
    yield b"[" * depth
    yield b'{"kind":' * depth


@pytest.mark.parametrize("depth", [MAX_DEPTH, 100, 300, 600, 950, 2000, 100_000])
def test_no_depth_exhausts_the_interpreter(depth: int) -> None:
    """Some depths can be parsed but not handled, and they fit a rank's line: they would end its
    agent."""
    for line in nested_lines(depth):
        with pytest.raises(ProtocolError):
            from_line(line)


def test_what_is_deep_enough_to_be_read_can_be_told_on() -> None:
    limit = sys.getrecursionlimit()
    levels = MAX_DEPTH - 2
    fact = from_line(b'{"kind":"in_force","values":{"a":' + b"[" * levels + b"]" * levels + b"}}")
    try:
        sys.setrecursionlimit(_frames() + 200)
        assert b"[" * levels in to_line(NumberedFact(1, RankFact(1, "1.00", 0, fact)))
    finally:
        sys.setrecursionlimit(limit)


def _frames() -> int:
    frame, count = sys._getframe(), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


@settings(max_examples=300, deadline=None)
@given(line=st.binary(max_size=60) | PLAIN.map(json.dumps).map(str.encode))
def test_no_bytes_are_worse_than_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        from_line(line)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_message_with_one_value_changed_is_refused_or_read(data: st.DataObject) -> None:
    """A damaged or forged field at any depth: a `ProtocolError` or a message that can be told
    on."""
    payload = parse(to_line(data.draw(st.sampled_from(CLASSES).flatmap(messages))))
    target = payload
    while inner := [v for v in target.values() if isinstance(v, dict)]:
        if data.draw(st.booleans()):
            break
        target = data.draw(st.sampled_from(inner))
    if target:
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(PLAIN)
    try:
        arrived = from_line(json.dumps(payload).encode())
    except ProtocolError:
        return
    assert from_line(to_line(arrived)) is not None


# What a pipe takes at once ------------------------------------------------------------------------


CONFIG = RunConfig(
    optim=OptimConfig(lr=0.1 + 0.2, eps=1.2345678901234567e-08),
    train=TrainConfig(steps=10**7, global_batch=2048),
)
WIDEST = -1.2345678901234567e-300
FOLDER = f"/{'lustre/project-0123/' * 12}runs/opt-175b/checkpoints/12.43/step-00140000"
LINE = {
    "attempt": "12.143",
    "step": 10**9,
    "updates": 10**9,
    "samples": 10**12,
    "tokens": 10**15,
    "time": 1767225600.123,
    "loss": WIDEST,
    "lr": WIDEST,
    "grad_norm": WIDEST,
    "grad_norm_clipped": WIDEST,
    "activation_norm": WIDEST,
    "loss_scale": WIDEST,
    "overflow": False,
    "skipped": False,
    "tokens_per_second": WIDEST,
    "mfu": WIDEST,
    "step_seconds": WIDEST,
    "data_seconds": WIDEST,
    "memory_bytes": 10**12,
    "journal_head": "ab" * 32,
} | {f"plugin/metric_number_{k}": WIDEST for k in range(40)}
FILES = [f"shard-{k:05d}-model-00001-of-00001.safetensors" for k in range(20)]
USUAL: tuple[Message, ...] = (
    facts.Warm(4_000_000, WIDEST),
    facts.Store("node-0123.cluster.example.com", 65535),
    facts.Phase("evaluation", 10**9),
    facts.Progress(10**13, 10**13),
    InForce(in_force(CONFIG, (), 1234567) | {"step": 10**9, "data_fingerprint": "ab" * 32}),
    Metrics(LINE),
    facts.Validation("pile/" + "validation" * 6, 10**9, WIDEST, 10**12),
    ShardsSaved(10**9, FOLDER, tuple(SavedFile(path, 10**12, "ab" * 32) for path in FILES), WIDEST),
    facts.SnapshotTaken(
        10**9, (facts.MemoryFile(FILES[0], 10**12, "ab" * 32, 10**6),) * 2, 1.0, True
    ),
    facts.SaveFailed(10**9, "No space left on device: " + FOLDER * 3),
    facts.OrderObeyed(10**6, 10**9),
    facts.RolledBack(10**9, "9999.9999", 10**6),
    facts.Probed(10**6, 10**9, (10**13,) * 32, (WIDEST,) * 32, (10**5,) * facts.ODD_RANKS_MAX),
    ExitNotice(81, 10**9, "x" * 2000, 10**6, "corrupt_checkpoint"),
)


def test_every_fact_of_a_rank_fits_a_write_that_cannot_tear() -> None:
    assert {type(fact) for fact in USUAL} == set(FACTS_OF_A_RANK)
    lengths = {fact.kind: len(to_line(fact)) for fact in USUAL}
    assert {kind: length for kind, length in lengths.items() if length > MAX_FACT_BYTES} == {}
    # The long ones are long: the table would otherwise say nothing.
    assert (
        min(lengths[kind] for kind in ("metrics", "shards_saved", "leaving", "save_failed")) > 800
    )


@pytest.mark.parametrize("kind", [c for c in CLASSES if issubclass(c, commands.Command)])
@given(data=st.data())
@settings(max_examples=20)
def test_every_command_declares_what_makes_two_of_it_the_same(
    kind: type[commands.Command], data: st.DataObject
) -> None:
    """A kind without a key of its own would make a second order wait until the first may be sent
    again."""
    command = data.draw(messages(kind))
    assert "key" in vars(kind)
    assert all(isinstance(part, str) for part in command.key)
    assert command.key == from_line(to_line(command)).key  # type: ignore[attr-defined]


def test_whatever_is_sent_to_an_agent_or_a_warm_rank_is_a_command() -> None:
    assert {c for c in CLASSES if c.__module__ == commands.__name__} == {
        c for c in CLASSES if issubclass(c, commands.Command)
    }


def test_two_orders_to_one_generation_are_two_commands() -> None:
    first, second = (commands.Relay(1, orders.SaveAndStop(number, "why")) for number in (1, 2))
    assert first.key != second.key
