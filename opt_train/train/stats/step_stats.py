"""The step stats: one small vector that all ranks reduce once a step, as one table of columns.

How it works
------------
**Why one vector.** After each step every rank has numbers that only the world can complete: its
part of the loss, how long it took, whether it saw a SIGTERM. They travel together, one
contribution a rank, reduced over all ranks. The result is the same everywhere, to the bit, so
whatever is decided from it (count an update, stop, obey an order) every rank decides alike without
asking again. What is decided from anything else, a clock or a pipe of one's own, ranks decide at
different steps.

**Why a CPU group.** The vector has a gloo group to itself. On NCCL it would queue behind the
gradients' collectives, and to read it the host would have to wait for the device. A gloo
all-reduce of up to 64 doubles takes 0.3 to 1 ms, on a thread of its own.

**Why it is read one boundary late.** `StatsReducer.start` begins the reduction when the step is
queued on the device; the result is read at the boundary *behind the next step*. It had a whole step
to arrive, so nobody waits for it. Nothing needs it sooner: whether a gradient is applied, clipped
or skipped is decided on the device from the norm that the device has reduced
(`opt_train.optim.clip`), and this vector informs the host afterwards.

    step n:    forward, backward, update queued ──► start(n)
    step n+1:  forward, backward, update queued ──► start(n+1)
    boundary:  collect(n): the same on every rank; count, publish, obey; then step n+2

**Why orders ride in it.** The supervisor sends an order to rank 0 alone, which puts the order's
number into its column. All ranks see the number at the same boundary, and only then is the order's
body broadcast. Measured with four ranks that each read their own pipe instead: 19 to 20 of 20
orders were obeyed at different steps. With the number in this vector: 0 of 20.

**How it is packed.** `COLUMNS` says of each value how the world reduces it, and which metrics it
becomes. `pack` and `unpack` walk the table, `opt_train.train.stats.metrics` makes the metrics line
of it, docs/generate.py the table of docs/metrics.md. Some columns are there on some steps alone, or
hold a number a layer: a rank gives None, or as many numbers as every other rank on that step (which
steps do is known to all alike, `opt_train.train.probes`), so the vector is as long on each.

To add a column that becomes a metric: a field of `StatsColumns` and its line in `COLUMNS`, here,
and its value where it is measured. Whoever reads it, as a detector does, asks the metrics for its
key.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from opt_train.train.stats.columns import Column, Metric, Reduction, Value

RESOLVED = 1e-12
"""Part of a sum in fp64 below which a difference is rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsColumns:
    """One value for each of `COLUMNS`, which says what they are."""

    loss_sum: float = 0.0
    tokens: float = 0.0
    activation_squares: float = 0.0
    skipping_ranks: int = 0
    stop_votes: int = 0
    saving_ranks: int = 0
    grad_norm: float = 0.0
    clipped_norm: float = 0.0
    mean_loss: float = 0.0
    loss_scale: float = 1.0
    order_number: int = 0
    step_seconds: float = 0.0
    data_seconds: float = 0.0
    memory_bytes: int = 0
    update_squares: float | None = None
    sampled_squares: float | None = None
    embedding_squares: float | None = None
    layer_grad_squares: tuple[float, ...] | None = None
    layer_weight_squares: tuple[float, ...] | None = None
    attention_logit: float | None = None
    sampled_logit: float | None = None
    gemm_tflops: tuple[float, ...] | None = None
    sequences: float = 0.0
    token_entropies: float = 0.0
    equal_labels: float = 0.0
    duplicates: float = 0.0
    repeats: float = 0.0
    comparing_ranks: int = 0
    differing_ranks: int = 0
    differing_rank: int = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStats(StatsColumns):
    """What one rank contributes to the vector of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats(StatsColumns):
    """What the vector of `step` has come to: the world's values, the same on every rank."""

    step: int
    """The batch's number, from 0."""

    @property
    def loss(self) -> float:
        """Nats a token; NaN where nobody had one."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def activation_norm(self) -> float:
        """Root mean square over tokens of the L2 norm of the last layer's output."""
        if not self.tokens or not self.activation_squares >= 0:
            return math.nan
        return math.sqrt(self.activation_squares / self.tokens)

    @property
    def skipped(self) -> bool:
        """The update was not applied, on any rank (`StatsReducer.collect` refuses a part)."""
        return self.skipping_ranks > 0

    @property
    def refused(self) -> bool:
        """The update was left out because it was an outlier."""
        return self.skipped and not self.overflow and math.isfinite(self.mean_loss)

    @property
    def overflow(self) -> bool:
        """The gradient was not finite."""
        return not math.isfinite(self.grad_norm)

    @property
    def clip_factor(self) -> float | None:
        """What clipping has left of the gradient; None where it was not finite, or zero."""
        factor = self.clipped_norm / self.grad_norm if self.grad_norm else math.nan
        return factor if math.isfinite(factor) and not self.overflow else None

    @property
    def tokens_per_second(self) -> float:
        """All ranks together; 0 before there was a step to time."""
        return self.tokens / self.step_seconds if self.step_seconds > 0 else 0.0

    @property
    def update_ratio(self) -> float | None:
        """What the update before this step has changed, relative to the weights: the ratio of L2
        norms over a sample of them; None at a rank's first step."""
        if self.update_squares is None or self.sampled_squares is None:
            return None
        if not (self.update_squares >= 0 and self.sampled_squares > 0):
            return math.nan
        return math.sqrt(self.update_squares / self.sampled_squares)

    @property
    def batch_token_entropy(self) -> float | None:
        """Of the tokens within a sequence, nats, in the mean; None where none were looked at."""
        return self.token_entropies / self.sequences if self.sequences else None

    @property
    def batch_equal_labels(self) -> float | None:
        """Share of the labels that are the input at the same place."""
        return self.equal_labels / self.tokens if self.sequences and self.tokens else None

    @property
    def batch_duplicates(self) -> float | None:
        """Share of the sequences that are the same as one before them."""
        return self.duplicates / self.sequences if self.sequences else None

    @property
    def batch_repeats(self) -> float | None:
        """Share of the sequences that were read before, as far off as those of the batch before."""
        return self.repeats / self.sequences if self.sequences else None

    @property
    def replay_differs(self) -> int | None:
        """Ranks whose own numbers are not those of the first time; None where the step is not
        trained again."""
        return self.differing_ranks if self.comparing_ranks else None

    @property
    def replay_rank(self) -> int | None:
        """The one rank whose numbers are not; None where none is, or more than one."""
        return self.differing_rank if self.differing_ranks == 1 else None

    @property
    def embedding_grad_ratio(self) -> float | None:
        """The L2 norm of the embedding's part of the averaged gradient, before clipping, relative
        to that of all the rest; None where the engine does not tell the parts."""
        if self.embedding_squares is None:
            return None
        whole = self.grad_norm * self.grad_norm
        if not (math.isfinite(whole) and whole > 0 and self.embedding_squares >= 0):
            return math.nan
        # Beside a million times as much the rest is lost in the rounding of the sum.
        rest = max(whole - self.embedding_squares, RESOLVED * whole)
        return math.sqrt(self.embedding_squares / rest)

    @property
    def layer_grad_norms(self) -> tuple[float, ...] | None:
        """L2 norm of each layer's averaged gradient, before clipping, without loss scale: of the
        embedding, the layers, and what is behind them (`opt_train.optim.per_layer_norms`)."""
        return _roots(self.layer_grad_squares)

    @property
    def layer_weight_norms(self) -> tuple[float, ...] | None:
        """The same of the weights, before the update."""
        return _roots(self.layer_weight_squares)


def _roots(squares: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Square roots; NaN of what is no number, or has been summed below 0."""
    if squares is None:
        return None
    return tuple(math.sqrt(square) if square >= 0 else math.nan for square in squares)


# The table ----------------------------------------------------------------------------------------

DIGITS = 5
"""Significant ones of what is listed by layer or probed: hundreds of numbers must fit the 4096
bytes of a metrics line."""


def _rounded(number: float | None) -> float | None:
    if number is None:
        return None
    return float(f"{number:.{DIGITS}g}")


def _rounded_list(numbers: tuple[float, ...] | None) -> list[float | None] | None:
    if numbers is None:
        return None
    return [_rounded(number) for number in numbers]


def _slowest_rank(stats: StepStats) -> int | None:
    if stats.gemm_tflops is None:
        return None
    return stats.gemm_tflops.index(min(stats.gemm_tflops))


def _of_speeds(stats: StepStats, choose: Callable[[tuple[float, ...]], float]) -> float | None:
    if stats.gemm_tflops is None:
        return None
    return _rounded(choose(stats.gemm_tflops))


SUM, MAX, FIRST, EACH = Reduction

COLUMNS = (
    Column(
        "loss_sum",
        SUM,
        "nats",
        "cross entropies of the rank's tokens",
        Metric(
            "loss", "nats a token", "mean cross entropy over the global batch, before the update"
        ),
    ),
    Column(
        "grad_norm",
        FIRST,
        "",
        "of the gradient of all ranks, which each of them has",
        Metric(
            "grad_norm",
            "",
            "L2 norm of the whole gradient of the mean loss, before clipping, loss scale taken out",
        ),
        Metric("overflow", "true, false", "the gradient was not finite"),
    ),
    Column(
        "clipped_norm",
        FIRST,
        "",
        "the same behind clipping",
        Metric(
            "grad_norm_clipped", "", "`grad_norm` after clipping", lambda stats: stats.clipped_norm
        ),
        Metric(
            "clip_factor",
            "0 to 1",
            "`grad_norm_clipped` divided by `grad_norm`; `null` of a gradient that is not finite",
            lambda stats: _rounded(stats.clip_factor),
        ),
    ),
    Column(
        "skipping_ranks",
        SUM,
        "ranks",
        "1 where the rank's device left the update out",
        Metric("skipped", "true, false", "the update was left out, on every rank alike"),
        is_whole=True,
    ),
    Column(
        "loss_scale",
        FIRST,
        "",
        "what the step was taken with",
        Metric("loss_scale", "", "what the step was taken with; 1 where gradients are not scaled"),
    ),
    Column(
        "activation_squares",
        SUM,
        "",
        "squared L2 norms of the last layer's output, over the rank's tokens",
        Metric(
            "activation_norm",
            "",
            "root mean square over tokens of the L2 norm of the last layer's output: OPT's "
            "sign of divergence",
        ),
    ),
    Column(
        "update_squares",
        SUM,
        "",
        "squares of what the update before has changed, over a sample of the rank's weights",
        Metric(
            "update_ratio",
            "",
            "L2 norm of what the update before this step has changed, relative to that of the "
            "weights, over a sample of them: the first sign of a learning rate that is too high",
            lambda stats: _rounded(stats.update_ratio),
        ),
    ),
    Column(
        "sampled_squares",
        SUM,
        "",
        "squares of those weights before it",
    ),
    Column(
        "embedding_squares",
        SUM,
        "",
        "the rank's share of the squared L2 norm of the embedding's part of the averaged gradient",
        Metric(
            "embedding_grad_ratio",
            "",
            "L2 norm of the embedding's part of the gradient (tied head included), relative to "
            "that of all the rest",
            lambda stats: _rounded(stats.embedding_grad_ratio),
        ),
    ),
    Column(
        "sampled_logit",
        MAX,
        "",
        "largest attention logit over a sample of the rank's first sequence",
        Metric(
            "attention_logit",
            "",
            "largest attention logit over a sample of each rank's positions, on every step, below",
            lambda stats: _rounded(stats.sampled_logit),
        ),
    ),
    Column(
        "tokens",
        SUM,
        "tokens",
        "the rank's; ranks that read the same ones share them out",
        Metric(
            "tokens_per_second",
            "tokens a second",
            "the global batch's tokens divided by `step_seconds`, all ranks together",
        ),
        is_whole=True,
    ),
    Column(
        "step_seconds",
        MAX,
        "seconds",
        "since the step before",
        Metric(
            "step_seconds",
            "seconds",
            "from the end of one step to the end of the next, without saves and validation; "
            "of the slowest rank",
        ),
    ),
    Column(
        "data_seconds",
        MAX,
        "seconds",
        "reading the rank's micro-batches",
        Metric("data_seconds", "seconds", "reading the batch; of the slowest rank"),
    ),
    Column(
        "memory_bytes",
        MAX,
        "bytes",
        "the most the rank has had",
        Metric(
            "memory_bytes",
            "bytes",
            "the most so far on any rank: allocated on the GPU, or resident where there is none",
        ),
        is_whole=True,
    ),
    Column(
        "layer_grad_squares",
        SUM,
        "",
        "the rank's shares of the squared L2 norm of each layer's averaged gradient, before "
        "clipping: embedding, layers, and what is behind them",
        Metric(
            "layer_grad_norms",
            "",
            "L2 norm of each layer's part of the gradient: a list, below",
            lambda stats: _rounded_list(stats.layer_grad_norms),
        ),
    ),
    Column(
        "layer_weight_squares",
        SUM,
        "",
        "the same of the weights, before the update",
        Metric(
            "layer_weight_norms",
            "",
            "L2 norm of each layer's weights: a list, below",
            lambda stats: _rounded_list(stats.layer_weight_norms),
        ),
    ),
    Column(
        "attention_logit",
        MAX,
        "",
        "largest attention logit of the rank's first micro-batch",
        Metric(
            "attention_logit_max",
            "",
            "largest attention logit of the model, below",
            lambda stats: _rounded(stats.attention_logit),
        ),
    ),
    Column(
        "gemm_tflops",
        EACH,
        "10^12 operations a second",
        "the rank's speed at the fixed product",
        Metric(
            "gemm_tflops_min",
            "10^12 operations a second",
            "the fixed product's speed on the slowest rank, below",
            lambda stats: _of_speeds(stats, min),
        ),
        Metric(
            "gemm_tflops_median",
            "10^12 operations a second",
            "the same on the rank in the middle",
            lambda stats: _of_speeds(stats, statistics.median),
        ),
        Metric("gemm_slowest_rank", "rank, from 0", "whose `gemm_tflops_min` it is", _slowest_rank),
    ),
    Column(
        "token_entropies",
        SUM,
        "nats",
        "entropies of the tokens within each of the rank's sequences",
        Metric(
            "batch_token_entropy",
            "nats",
            "entropy of the tokens within a sequence, in the mean over the batch: 0 where each is "
            "one token over and over",
            lambda stats: _rounded(stats.batch_token_entropy),
        ),
    ),
    Column(
        "equal_labels",
        SUM,
        "tokens",
        "labels of the rank that are the input at the same place",
        Metric(
            "batch_equal_labels",
            "0 to 1",
            "share of the labels that are the input at the same place: 1 where labels were never "
            "moved by one",
            lambda stats: _rounded(stats.batch_equal_labels),
        ),
    ),
    Column(
        "duplicates",
        SUM,
        "sequences",
        "the rank's that are the same as one before them",
        Metric(
            "batch_duplicates",
            "0 to 1",
            "share of the sequences that are the same as one before them on their rank",
            lambda stats: _rounded(stats.batch_duplicates),
        ),
    ),
    Column(
        "repeats",
        SUM,
        "sequences",
        "the rank's that it has read before, as far off as those of the batch before",
        Metric(
            "batch_repeats",
            "0 to 1",
            "share of the sequences that their rank has read before, all as many batches ago: 1 "
            "where the data goes in circles",
            lambda stats: _rounded(stats.batch_repeats),
        ),
    ),
    Column("sequences", SUM, "sequences", "of the rank, by which the four above are divided"),
    Column(
        "comparing_ranks",
        SUM,
        "ranks",
        "1 where the rank has gone back in place and trains the step again, all being equal",
        is_whole=True,
    ),
    Column(
        "differing_ranks",
        SUM,
        "ranks",
        "1 where the rank's own numbers are not those of the first time, to the bit",
        Metric(
            "replay_differs",
            "ranks",
            "whose own part of the loss is not, to the bit, what it was when the step was trained "
            "the first time, from the same state, on the same data and under the same values; "
            "nothing where the step is not trained again",
        ),
        is_whole=True,
    ),
    Column(
        "differing_rank",
        MAX,
        "",
        "its number where the rank's are not; else -1",
        Metric("replay_rank", "", "the one whose it is, where it is one"),
        is_whole=True,
    ),
    # What ranks agree by, and no metric.
    Column(
        "mean_loss",
        FIRST,
        "nats a token",
        "`loss` as the device has summed it up, by which a step is refused as an outlier",
    ),
    Column(
        "stop_votes",
        SUM,
        "ranks",
        "1 where the rank saw SIGTERM, SIGUSR1 or, without an agent, SIGINT",
        is_whole=True,
    ),
    Column(
        "saving_ranks",
        SUM,
        "ranks",
        "1 where the rank still writes the checkpoint that was begun last",
        is_whole=True,
    ),
    Column(
        "order_number",
        FIRST,
        "",
        "the newest order that has come down rank 0's pipe",
        is_whole=True,
    ),
)


# The vector ---------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """The vector's two parts, each reduced by one collective."""

    sums: list[float]
    """Of SUM, FIRST and EACH. A sum carries a NaN from any rank to all of them, which a maximum
    does not promise."""
    maxima: list[float]


def pack(own: StatsColumns, rank: int, world_size: int) -> Packed:
    """`rank`'s contribution, in the order of `COLUMNS`."""
    packed = Packed([], [])
    for column in COLUMNS:
        part = packed.maxima if column.reduction is Reduction.MAX else packed.sums
        part += column.contribution(getattr(own, column.name), rank, world_size)
    return packed


def unpack(step: int, own: StatsColumns, world_size: int, reduced: Packed) -> StepStats:
    """The world's values of `step`, from what all ranks' `pack` was reduced to.

    Args:
        own: what this rank packed, which tells how long each column is.
    """
    sums, maxima = iter(reduced.sums), iter(reduced.maxima)
    values: dict[str, Any] = {}
    for column in COLUMNS:
        mine: Value = getattr(own, column.name)
        part: Iterator[float] = maxima if column.reduction is Reduction.MAX else sums
        numbers = list(islice(part, column.width(mine, world_size)))
        values[column.name] = column.value(numbers, mine)
    return StepStats(step=step, **values)


def step_metrics(stats: StepStats) -> dict[str, Any]:
    """The part of the step's metrics line that its columns become, by key."""
    return {metric.key: metric.value(stats) for column in COLUMNS for metric in column.metrics}
