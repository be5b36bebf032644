"""A cause is one row: every table that goes by causes has them all, and none that is no cause."""

import pytest
from opt_logbook.story import format as chronicle

from opt_train.diagnosis.causes import CAUSES, Blame, Cause, EccDetail, blame_of, cause_named
from opt_train.diagnosis.patterns import ROOTS, VICTIMS
from opt_train.diagnosis.verdict import FIRST_SIGNS


def test_every_cause_has_a_row_and_a_meaning_in_one_sentence() -> None:
    assert list(CAUSES) == list(Cause)
    for cause, row in CAUSES.items():
        assert row.meaning.endswith("."), cause
        assert row.meaning[0].isupper(), cause


def test_the_chronicle_has_words_for_every_cause() -> None:
    """The logbook imports nothing of opt_train: its table is proven here to have the same
    labels."""
    assert set(chronicle.CAUSES) == set(Cause)


def test_every_pattern_and_first_sign_shows_a_cause() -> None:
    indications = [pattern.indication for pattern in (*ROOTS, *VICTIMS)]
    indications += [indication for _, indication in FIRST_SIGNS.values()]
    for indication in indications:
        assert indication.cause in CAUSES
        assert 0.0 < indication.confidence < 1.0


def test_every_ecc_detail_has_a_pattern() -> None:
    shown = {p.indication.detail for p in ROOTS if p.indication.cause == Cause.GPU_ECC}
    assert shown == set(EccDetail)


@pytest.mark.parametrize("label", ["", "gpu", "a cause of another version"])
def test_a_label_that_is_no_cause_is_unknown_and_blames_nobody(label: str) -> None:
    assert cause_named(label) == Cause.UNKNOWN
    assert blame_of(label) == Blame.UNKNOWN
    assert blame_of("gpu_lost") == Blame.HARDWARE
