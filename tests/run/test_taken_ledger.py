"""A ledger that is taken from another run is that run's, whole, or the start is refused in one
sentence; what keeps the weights from being the same is named."""

from dataclasses import replace
from pathlib import Path

import pytest
from opt_logbook.record.events import (
    AttemptStarted,
    Entry,
    Event,
    LineageOpened,
    OrderEnded,
    OrderGiven,
    RunCreated,
)
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.run_config import RunConfig, to_json
from opt_train.optim.config import OptimConfig
from opt_train.protocol.exits import BadInput
from opt_train.protocol.orders import LedgerEntry, RollBack, ScaleLr, SetClip, SkipSamples
from opt_train.run.fold import fold
from opt_train.run.ledger import TakenLedger
from opt_train.run.ledger import to_json as ledger_to_json
from opt_train.run.past.taken_ledger import take_ledger
from opt_train.run.state import RunState
from opt_train.supervisor.rules.orders import order_given

CUT, CLIP, PASS = ScaleLr(1, "", 0.5), SetClip(2, "", 0.3), SkipSamples(4, "", 24)
BACK = RollBack(3, "it climbs", 20, "1.01", 2, (PASS,))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(name="new", runs=str(tmp_path), optim=OptimConfig(warmup_steps=2))


def attempt(name: str, generation: int, parent: str = "", ranks: int = 1) -> AttemptStarted:
    return AttemptStarted(generation, parent, "", "", ("n",), (), ranks, "")


def obeyed(step: int, number: int) -> tuple[str, int, Event]:
    return "1.00", step, OrderEnded(number, "obeyed")


def write(path: Path, config: RunConfig, *lines: tuple[str, int | None, Event]) -> RunDirectory:
    """A run directory of `config` with these journal lines behind the first two."""
    run = RunDirectory(path)
    kept = run.path / "code" / "1"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text(to_json(config))
    (kept / "packages.txt").write_text("")
    created = RunCreated("old", 0, "tiny", 1, 100, 8, data_fingerprint="ab" * 32)
    first: tuple[tuple[str, int | None, Event], ...] = (
        ("", None, created),
        ("", None, LineageOpened(1, "")),
    )
    with Lock.acquire(run) as lock, Journal.open(run, lock) as journal:
        for name, step, event in (*first, *lines):
            journal.append(Entry(1.0, name, step, event))
    return run


@pytest.fixture
def old(tmp_path: Path, config: RunConfig) -> RunDirectory:
    """A run that was ordered a cut behind step 10 and a clip behind 30, and then went back to 20,
    to pass data over from there on."""
    return write(
        tmp_path / "old",
        config,
        ("1.00", 0, attempt("1.00", 1)),
        ("1.00", 9, order_given(CUT)),
        obeyed(10, 1),
        ("1.00", 29, order_given(CLIP)),
        obeyed(30, 2),
        ("1.00", 40, order_given(BACK)),
        ("1.01", 20, attempt("1.01", 2, "1.00")),
        ("1.01", 20, OrderEnded(3, "obeyed")),
    )


def taken(tmp_path: Path, config: RunConfig, request: str = "old") -> TakenLedger:
    found = take_ledger(RunDirectory(tmp_path / "new"), config, request)
    assert found is not None
    return found


def test_it_is_what_the_surviving_line_is_trained_under(
    old: RunDirectory, tmp_path: Path, config: RunConfig
) -> None:
    """The clip too, which was ordered on steps that were given up: it held again when the line came
    there."""
    found = taken(tmp_path, config)
    assert found.source == str(old.path)
    assert found.entries == (LedgerEntry(10, CUT), LedgerEntry(30, CLIP), LedgerEntry(20, PASS))
    assert taken(tmp_path, config, str(old.path)) == found


def test_the_first_line_of_the_new_journal_holds_it(
    old: RunDirectory, tmp_path: Path, config: RunConfig
) -> None:
    entries = taken(tmp_path, config).entries
    created = RunCreated(
        "new", 0, "tiny", 1, 1, 1, ledger_of="x", ledger=tuple(ledger_to_json(entries))
    )
    state = fold(RunState(), Entry(1.0, "", None, created))
    assert state.ledger == entries
    assert state.orders_given == 4, "its own orders are numbered behind those it took"
    assert state.settled_order == 4, "they are no news to the ranks"


def test_what_keeps_the_weights_from_being_the_same_is_named(
    old: RunDirectory, tmp_path: Path, config: RunConfig
) -> None:
    def apart(changed: RunConfig) -> list[str]:
        found = taken(tmp_path, changed).difference
        return [line for line in found if not line.startswith(("code:", "torch:"))]

    # The packages of this made run are not on record; what is configured alike has no other line.
    alike = [line for line in apart(config) if " absent -> " not in line]
    assert alike == []
    several = replace(
        config,
        seed=5,
        train=replace(config.train, micro_batch=1, validate_every=7),
        cluster=replace(config.cluster, nodes=3, slots_per_node=1),
    )
    assert [line for line in apart(several) if " absent -> " not in line] == [
        "seed: 0 -> 5",
        f"train.micro_batch: {config.train.micro_batch} -> 1",
        "ranks: 1 -> 3",
    ]
    found = taken(tmp_path, config)
    assert found.difference_on("ab" * 32) == found.difference
    assert found.difference_on("cd" * 32)[-1] == "data: tokens abababababab -> cdcdcdcdcdcd"


def test_steps_are_a_difference_only_where_they_decide_a_rate(
    old: RunDirectory, tmp_path: Path, config: RunConfig
) -> None:
    longer = replace(config, train=replace(config.train, steps=config.train.steps + 1))
    assert any(line.startswith("train.steps") for line in taken(tmp_path, longer).difference)
    constant = replace(longer, optim=replace(config.optim, schedule="constant"))
    found = taken(tmp_path, constant).difference
    assert not any(line.startswith("train.steps") for line in found)


def test_a_run_takes_a_ledger_as_it_begins_or_never(
    old: RunDirectory, tmp_path: Path, config: RunConfig
) -> None:
    new = write(tmp_path / "new", config)
    with pytest.raises(BadInput, match="has begun without, and a run takes a ledger as it begins"):
        take_ledger(new, config, "old")
    assert take_ledger(new, config, "") is None


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ("nothing", "ledger=nothing is no run directory, and runs=.* has none of that name"),
        ("odd", r"order 1 \(warp\) in the ledger of .*odd is of another version"),
        ("torn", r"journal.jsonl is damaged \(line 2\), and an order may have stood there"),
    ],
)
def test_what_cannot_be_known_is_refused(
    old: RunDirectory, tmp_path: Path, config: RunConfig, request_: str, sentence: str
) -> None:
    if request_ == "odd":
        given = ("1.00", 9, OrderGiven(1, "warp", "", {}))
        write(tmp_path / "odd", config, ("1.00", 0, attempt("1.00", 1)), given, obeyed(10, 1))
    if request_ == "torn":
        run = write(tmp_path / "torn", config, ("1.00", 0, attempt("1.00", 1)))
        run.journal.write_bytes(run.journal.read_bytes().replace(b'"lineage":1', b'"lineage":7'))
    with pytest.raises(BadInput, match=sentence):
        take_ledger(RunDirectory(tmp_path / "new"), config, request_)
