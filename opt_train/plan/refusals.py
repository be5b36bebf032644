"""What speaks against a plan, in sentences that name what would fix it. Standard library only."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from opt_train.config.run_config import RunConfig
from opt_train.config.sentences import listed
from opt_train.parallel.layout import Layout
from opt_train.plan.batch import Batch
from opt_train.plan.memory import MODES, memory_of
from opt_train.plan.plan import GB, Plan

# OPT-175B on one node fewer than its 124 idles 10.4 %: bearable for as long as a node is away, not
# for a whole run.
IDLE_SHARE_MAX = 0.10
"""Of the sequences computed; a plan that pads more is refused."""


def refusals(plan: Plan, allow_idle: bool) -> list[str]:
    """Why the run should not start as it is, a sentence with the fix each."""
    sentences = []
    if not plan.fits:
        sentences.append(_does_not_fit(plan))
    if plan.batch.idle_share > IDLE_SHARE_MAX and not allow_idle:
        sentences.append(_idles(plan))
    return sentences


def _does_not_fit(plan: Plan) -> str:
    peak, memory = plan.configured.peak, plan.gpu.memory_gb
    fixes = list(_fitting(_single_changes(plan), plan)) or list(_fitting(_everything(plan), plan))
    if fixes:
        fix = f"use {listed(fixes)}"
    else:
        # A tensor group is within a node.
        can_grow = plan.config.parallel.tensor < plan.config.cluster.slots_per_node
        larger = "a larger one, or " if can_grow else ""
        fix = (
            f"no number of nodes mends that with this parallel.tensor; use {larger}GPUs with "
            "more memory"
        )
    return (
        f"a rank needs {peak.total / GB:.1f} GB in {peak.when}, and the {plan.gpu.name} has "
        f"{memory:g}; {fix}"
    )


def _fitting(candidates: Iterable[tuple[str, RunConfig]], plan: Plan) -> Iterator[str]:
    """The first of the `candidates` for each key that fits and is not refused for its padding, with
    what it needs."""
    found: set[str] = set()
    idle_share_max = max(IDLE_SHARE_MAX, plan.batch.idle_share)
    for overrides, config in candidates:
        key = overrides.partition("=")[0]
        if key in found:
            continue
        layout = Layout.of(config.parallel, config.world_size)
        total = memory_of(config, layout, config.parallel.activation_checkpointing).peak.total
        if (
            total <= plan.gpu.memory_gb * GB
            and Batch.of(config, layout).idle_share <= idle_share_max
        ):
            found.add(key)
            yield f"{overrides} ({total / GB:.1f} GB)"


def _single_changes(plan: Plan) -> Iterator[tuple[str, RunConfig]]:
    """Overrides that need less memory, and the configuration with each; gentle ones of a key
    first."""
    config, parallel, train = plan.config, plan.config.parallel, plan.config.train
    for mode in MODES[MODES.index(parallel.activation_checkpointing) + 1 :]:
        changed = replace(config, parallel=replace(parallel, activation_checkpointing=mode))
        yield f"parallel.activation_checkpointing={mode}", changed
    for rows in range(plan.batch.rows // 2, 0, -1):
        yield f"train.micro_batch={rows}", replace(config, train=replace(train, micro_batch=rows))
    if parallel.accumulate == "whole" and plan.batch.micro_batches > 1:
        yield (
            "parallel.accumulate=shards",
            replace(config, parallel=replace(parallel, accumulate="shards")),
        )
    if parallel.replicate > 1:
        spread = replace(parallel, replicate=1, shard=0)
        yield "parallel.replicate=1 parallel.shard=0", replace(config, parallel=spread)
    for times in (2, 4, 8, 16):
        rows = min(train.micro_batch, -(-train.global_batch // (plan.layout.data_world * times)))
        smaller = f" train.micro_batch={rows}" if rows < train.micro_batch else ""
        if more := _on_nodes(replace(config, train=replace(train, micro_batch=rows)), plan, times):
            yield f"{more[0]}{smaller}", more[1]


def _everything(plan: Plan) -> Iterator[tuple[str, RunConfig]]:
    """All that saves most at once, on more and more nodes."""
    config = plan.config
    parallel = replace(
        config.parallel, activation_checkpointing="full", accumulate="shards", replicate=1
    )
    least = replace(config, parallel=parallel, train=replace(config.train, micro_batch=1))
    also = "parallel.activation_checkpointing=full train.micro_batch=1 parallel.accumulate=shards"
    if config.parallel.replicate > 1:
        also += " parallel.replicate=1"
    for times in (1, 2, 4, 8, 16, 32, 64, 128):
        if more := _on_nodes(least, plan, times):
            yield f"{more[0]} {also}", more[1]


def _on_nodes(config: RunConfig, plan: Plan, times: int) -> tuple[str, RunConfig] | None:
    """`config` on so many times its nodes; None where the batch has no sequence for each of
    them."""
    if config.train.global_batch < plan.layout.data_world * times:
        return None
    nodes, parallel = config.cluster.nodes * times, config.parallel
    more = replace(
        config, cluster=replace(config.cluster, nodes=nodes), parallel=replace(parallel, shard=0)
    )
    return f"cluster.nodes={nodes}{' parallel.shard=0' if parallel.shard else ''}", more


def _idles(plan: Plan) -> str:
    batch = plan.batch
    fixes = list(_without_padding(plan))
    best = batch.best_micro_batch()
    padded = Batch.split(batch.sequences, batch.data_ranks, best)
    if padded.idle_share <= IDLE_SHARE_MAX:
        fixes.insert(0, f"train.micro_batch={best} ({padded.idle_share:.1%})")
    allowed = "--allow-idle"
    if padded.computed < batch.computed and padded.idle_share > IDLE_SHARE_MAX:
        allowed = f"train.micro_batch={best} ({padded.idle_share:.1%}) and --allow-idle"
    return (
        f"{batch.idle_share:.1%} of the sequences computed are padding, more than "
        f"{IDLE_SHARE_MAX:.0%}, because "
        f"{batch}; use {listed(fixes)}, or {allowed}"
    )


def _without_padding(plan: Plan) -> Iterator[str]:
    """The nearest global batches, a smaller and a larger one, that this layout shares evenly."""
    ranks, micro_batch = plan.batch.data_ranks, plan.config.train.micro_batch
    share = plan.batch.sequences // ranks

    def even(one: int) -> bool:
        return Batch.split(one * ranks, ranks, micro_batch).idle_share == 0.0

    smaller = [one for one in range(share, 0, -1) if even(one)][:1]
    larger = [one for one in range(share + 1, share + micro_batch + 1) if even(one)][:1]
    for one in smaller + larger:
        fits = (
            f" train.micro_batch={one}" if one < micro_batch else ""
        )  # more than a share is refused
        yield f"train.global_batch={one * ranks}{fits}"
