"""A value of the wrong type must be refused where it is written, not found out by arithmetic
later."""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opt_train.config.builder import build
from opt_train.protocol.exits import BadInput


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: float = 6e-4
    share: float = 0.25
    name: str = "adam"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    count: int = 12
    fast: bool = False
    inner: Inner = field(default_factory=Inner)


def sentence(values: object) -> str:
    with pytest.raises(BadInput) as refused:
        build(Outer, values)
    return str(refused.value)


def test_an_int_becomes_the_float_it_stands_for_and_nothing_else_converts() -> None:
    made = build(Outer, {"inner": {"rate": 1, "share": 1e-3}})
    assert made == Outer(inner=Inner(rate=1.0, share=1e-3))
    assert type(made.inner.rate) is float


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"count": True}, "count=True is not a whole number; give one like 12"),
        ({"count": "3"}, "count=3 is not a whole number; give one like 12"),
        ({"count": 3.0}, "count=3.0 is not a whole number; give one like 12"),
        ({"count": None}, "count=None is not a whole number; give one like 12"),
        ({"fast": 1}, "fast=1 is not true or false; give one like true"),
        ({"inner": {"rate": "abc"}}, "inner.rate=abc is not a number; give one like 6e-4"),
        ({"inner": {"share": False}}, "inner.share=False is not a number; give one like 0.25"),
        (
            {"inner": {"rate": float("inf")}},
            "inner.rate=inf is not a finite number; give one like 6e-4",
        ),
        ({"inner": {"name": 3}}, "inner.name=3 is not text; put it in quotes: 'inner.name=\"3\"'"),
        ({"inner": {"nmae": "x"}}, "inner.nmae is no configuration key; did you mean inner.name?"),
        (
            {"inner": 3},
            "inner=3 is not a group of keys; set its keys one by one, as inner.KEY=VALUE",
        ),
    ],
)
def test_a_wrong_value_is_one_sentence_with_the_mend(values: object, expected: str) -> None:
    assert sentence(values) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("abc", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


# A busy machine is no finding.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["count", "fast", "inner", "other"]), json_values))
def test_no_value_at_all_gets_through_with_a_wrong_type_or_another_exception(
    values: dict[str, object],
) -> None:
    try:
        made = build(Outer, values)
    except BadInput:
        return
    assert type(made.count) is int
    assert type(made.fast) is bool
    assert type(made.inner.rate) is float
