"""Which runs there are: families of sicknesses, each with the setting that it and its twin share,
and healthy runs.

Two halves: on *tuning* thresholds may be made, *held-out* is for the report. They share no family,
no seed, no learning rate and, but for fp16, no schedule.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

TUNING, HELD_OUT = "tuning", "held-out"
HALVES = (TUNING, HELD_OUT)

SIZES: Mapping[str, tuple[str, ...]] = {
    "d24": ("model.layers=1", "model.d_model=24", "model.ffn=96", "train.global_batch=4"),
    "d32": ("model.layers=2", "model.d_model=32", "model.ffn=128", "train.global_batch=8"),
    "d48": ("model.layers=2", "model.d_model=48", "model.ffn=192", "train.global_batch=8"),
}
"""Name -> its keys; the names are widths."""
BATCH = {"d24": 4, "d32": 8, "d48": 8}
SEQUENCE = 32
COMMON = (
    *("model=tiny", "model.heads=2", f"model.positions={SEQUENCE}", "model.vocab_size=320"),
    *(f"data.sequence_length={SEQUENCE}", "tokenizer.vocab_size=320"),
    *("data.max_bytes=3000000", "data.validation_fraction=0.08"),
    *("cluster=local", "cluster.nodes=1", "cluster.buffer_nodes=0", "cluster.code=installed"),
    *("cluster.rank_module=benchmarks.stability.sick_rank", "train.threads=1"),
    *("optim.beta2=0.95", "checkpoint.every_steps=1000000"),
    # A busy machine is no hang.
    *("supervisor.minimum_seconds=120", "supervisor.step_seconds=300"),
)
"""Of every run. Real text: the standard library's sources, in a vocabulary that has hardly more
than the bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """What a run and its twin have in common."""

    seed: int
    lr: float = 6e-3
    schedule: str = "linear"
    precision: str = "fp32"
    """``fp16`` is the trainer's own, with master weights in fp32: nothing is emulated."""
    size: str = "d32"
    more: tuple[str, ...] = ()
    """Further keys, of both."""

    @property
    def name(self) -> str:
        words = [self.precision, self.size, f"lr{self.lr:g}", self.schedule, f"seed{self.seed}"]
        if self.more:
            words.append(_digest(self.more)[:4])
        return "-".join(words)

    def overrides(self, steps: int) -> tuple[str, ...]:
        """The keys of `opt-train run`, for so many steps."""
        return (
            *COMMON,
            *SIZES[self.size],
            f"train.micro_batch={BATCH[self.size]}",
            f"seed={self.seed}",
            f"train.steps={steps}",
            f"precision={self.precision}",
            f"optim.lr={self.lr}",
            f"optim.schedule={self.schedule}",
            f"optim.warmup_steps={max(10, steps // 20)}",
            *((f"optim.cooldown_steps={steps // 5}",) if self.schedule == "wsd" else ()),
            *self.more,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One sickness, which may be met on several bases."""

    name: str
    kind: str
    sickness: Mapping[str, Any] = field(default_factory=dict)
    """For `sicknesses.inject`; empty: the configuration is what is sick."""
    onset: float = 0.0
    """A part of the run; 0: from the start."""
    length: float = 0.0
    """Of the sickness, a part of the run; 0: one step, or for good, as its `what` is."""
    wrong: tuple[str, ...] = ()
    """Keys that the twin does not have."""
    shared: tuple[str, ...] = ()
    """Keys that the twin has too."""
    precision: str = "fp32"
    curable: bool = True
    """Whether anything that a supervisor may do without a person could put it right."""
    names: tuple[str, ...] = ()
    """What names it rightly when it is handed over: alarms, causes of incidents."""

    def begins(self, steps: int) -> int:
        """The first sick step, from 0."""
        return round(self.onset * steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run to be done: on which base, with which sickness, under which control."""

    base: Base
    steps: int
    control: str
    family: Family | None = None
    """None: healthy."""
    odd_batches: tuple[int, ...] = ()
    """In a healthy run: single batches of garbage, which nothing need be done about."""

    @property
    def name(self) -> str:
        what = self.family.name if self.family else "healthy"
        spikes = "-spikes" if self.odd_batches else ""
        return f"{what}-{self.base.name}{spikes}-{self.steps}-{self.control}-{self.digest[:6]}"

    @property
    def digest(self) -> str:
        """Of all that decides what the run is: a setting that has changed is run again."""
        return _digest([self.overrides(), self.sick()])

    def overrides(self) -> tuple[str, ...]:
        """The keys of `opt-train run`; what comes later goes before."""
        family = self.family
        more = (*family.shared, *family.wrong) if family else ()
        return _last_of_each((*self.base.overrides(self.steps), *more, *CONTROLS[self.control]))

    def sick(self) -> dict[str, Any]:
        """What the rank is told (`sick_rank.SICK`)."""
        told: dict[str, Any] = {"peer": self.control if self.control in PEERS else ""}
        if self.control == OURS:
            told["step_seconds"] = STEP_SECONDS
        if self.family and self.family.sickness:
            first = self.family.begins(self.steps)
            length = round(self.family.length * self.steps)
            told["sickness"] = {**self.family.sickness, "first": first, "length": length}
        if self.odd_batches:
            told["odd_batches"] = list(self.odd_batches)
        return told


STEP_SECONDS = 0.02
"""What a step takes at least where the supervisor acts. One of a model this small takes 8 ms, and
what is trained until an answer of half a second has come would measure how small the model is. A
step of OPT-125M, 6 x 125M FLOPs for each of half a million tokens, is more than a second of an
A100's 312 TFLOP/s."""
ALONE, SKIP_STEP, ZCLIP, OURS = "alone", "skip-step", "zclip", "ours"
PEERS = (SKIP_STEP, ZCLIP)
_LEFT_ALONE = (
    "stability.mode=observe",
    "optim.skip_in_row=0",
    "checkpoint.memory_every_steps=0",
    # Else the rank itself would leave.
    "train.max_nonfinite_steps=1000000",
)
CONTROLS: Mapping[str, tuple[str, ...]] = {
    ALONE: _LEFT_ALONE,
    SKIP_STEP: _LEFT_ALONE,
    ZCLIP: _LEFT_ALONE,
    OURS: (
        "stability.mode=act",
        "checkpoint.memory_every_steps=10",
        "checkpoint.memory_keep=16",
    ),
}
"""Name -> its keys. Left alone, and under the peers, what is not finite is still skipped: every
trainer does that."""


def twin_of(family: Family, base: Base, steps: int, control: str = ALONE) -> Run:
    """The same run without the sickness."""
    more = (*base.more, *family.shared)
    base = _with(base, precision=family.precision, more=more)
    return Run(base=base, steps=steps, control=control)


def sick_run(family: Family, base: Base, steps: int, control: str) -> Run:
    """The run of `family` on `base` under `control`."""
    base = _with(base, precision=family.precision)
    return Run(base=base, steps=steps, control=control, family=family)


def healthy_runs(half: str, number: int, steps: int) -> list[Run]:
    """`number` runs without sickness under our supervision: learning rates, schedules, sizes and
    seeds in turn, odd batches in every fourth: at each of the rates."""
    found = []
    rates, schedules, first_seed = HEALTHY[half]
    sizes = tuple(SIZES)
    for n in range(number):
        base = Base(
            seed=first_seed + n,
            lr=rates[n % len(rates)],
            schedule=schedules[n // len(rates) % len(schedules)],
            size=sizes[n // 2 % len(sizes)],
        )
        odd = tuple(round(part * steps) for part in (0.35, 0.6, 0.85)) if n % 4 == 3 else ()
        found.append(Run(base=base, steps=steps, control=OURS, odd_batches=odd))
    return found


HEALTHY: Mapping[str, tuple[tuple[float, ...], tuple[str, ...], int]] = {
    TUNING: ((3e-3, 6e-3, 1.2e-2), ("linear", "constant"), 100),
    HELD_OUT: ((2e-3, 4e-3, 8e-3), ("cosine", "wsd"), 200),
}
"""Half -> learning rates, schedules, the first seed."""
BASES: Mapping[str, tuple[Base, ...]] = {
    TUNING: (
        Base(seed=0, schedule="linear"),
        Base(seed=1, schedule="constant"),
    ),
    HELD_OUT: (
        Base(seed=12, lr=4e-3, schedule="cosine"),
        Base(seed=13, lr=4e-3, schedule="wsd"),
    ),
}


def _with(base: Base, **changes: Any) -> Base:
    values = {name: getattr(base, name) for name in Base.__slots__}
    return Base(**{**values, **changes})


def _last_of_each(overrides: Sequence[str]) -> tuple[str, ...]:
    """Of each key what was given last."""
    return tuple({text.partition("=")[0]: text for text in overrides}.values())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def as_json(run: Run) -> dict[str, Any]:
    """What the run is, for its result's file."""
    return {"name": run.name, "control": run.control, "base": asdict(run.base), "sick": run.sick()}
