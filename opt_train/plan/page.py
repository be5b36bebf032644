"""A plan as text for a person. Standard library only."""

from collections.abc import Sequence

from opt_train.plan.batch import Batch
from opt_train.plan.memory import Memory
from opt_train.plan.plan import GB, Plan
from opt_train.plan.refusals import IDLE_SHARE_MAX

LABEL = 34
"""Columns of a row's name."""

COLUMN = 13
"""Columns of a number."""


def page(plan: Plan) -> str:
    """The whole plan."""
    parts = (
        _heading(plan),
        _memory(plan),
        _collectives(plan),
        _time(plan),
        _checkpoint(plan),
        _not_counted(plan),
    )
    return "\n\n".join(parts)


def table(heading: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows of words under `columns`, right-aligned."""
    width = max(
        COLUMN,
        *(len(word) + 2 for word in columns),
        *(len(c) + 2 for _, cells in rows for c in cells),
    )
    lines = [f"{heading:{LABEL}}" + "".join(f"{word:>{width}}" for word in columns)]
    lines += [
        f"  {name:{LABEL - 2}}" + "".join(f"{cell:>{width}}" for cell in cells)
        for name, cells in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def in_units(size: int) -> str:
    """Bytes in the largest unit that leaves 1 or more, with four digits that count."""
    for unit, bytes_of_it in (
        ("PB", 10**15),
        ("TB", 10**12),
        ("GB", 10**9),
        ("MB", 10**6),
        ("kB", 10**3),
    ):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.4g} {unit}"
    return f"{size} B"


def _heading(plan: Plan) -> str:
    config, layout, cluster = plan.config, plan.layout, plan.config.cluster
    parallel, precision = config.parallel, config.precision
    world = f"{_nodes(cluster.nodes)} of {cluster.slots_per_node}"
    idle = f"{plan.batch.idle_share:.1%} of the sequences computed are padding"
    rows = (
        (
            "model",
            f"{config.model.name}: {plan.parameters:,} parameters, {config.model.layers} layers",
        ),
        (
            "cluster",
            f"{world} {plan.gpu.name} with {plan.gpu.memory_gb:g} GB: {layout.world_size:,} ranks",
        ),
        ("layout", f"replicate {layout.replicate} x shard {layout.shard} x tensor {layout.tensor}"),
        (
            "precision",
            f"computing in {precision.compute}, weights in {precision.weights}, sums and moments "
            "in fp32",
        ),
        ("recomputation", f"activation_checkpointing={parallel.activation_checkpointing}"),
        ("batch", f"{plan.batch}; {plan.throughput.tokens_per_step:,} tokens"),
        ("idle", idle),
        ("  one node fewer", _without_a_node(plan)),
    )
    return "\n".join(f"{name:17}{text}" for name, text in rows)


def _without_a_node(plan: Plan) -> str:
    fewer = plan.without_a_node
    nodes = plan.config.cluster.nodes
    if nodes == 1:
        return "nothing is left; the run waits for the node"
    if fewer is None:
        return f"this layout does not go on {_nodes(nodes - 1)}{_what_would_go(plan)}"
    share = f"{fewer.idle_share:.1%}: {fewer}"
    best = fewer.best_micro_batch()
    padded = Batch.split(fewer.sequences, fewer.data_ranks, best)
    if padded.computed < fewer.computed:
        share += f"; with train.micro_batch={best} {padded.idle_share:.1%}"
    if padded.idle_share > IDLE_SHARE_MAX:
        share += f"; warning: more than {IDLE_SHARE_MAX:.0%}"
    return share


def _what_would_go(plan: Plan) -> str:
    """The change of the layout with which the ranks of one node fewer can be arranged."""
    parallel, cluster = plan.config.parallel, plan.config.cluster
    world = (cluster.nodes - 1) * cluster.slots_per_node
    if world % (parallel.replicate * parallel.tensor) == 0:
        return "; parallel.shard=0 would"
    # A tensor group is within a node, so what is left holds whole ones.
    return f"; parallel.replicate=1{' parallel.shard=0' if parallel.shard else ''} would"


def _nodes(count: int) -> str:
    return f"{count:,} {'node' if count == 1 else 'nodes'}"


def _memory(plan: Plan) -> str:
    columns = [f"{memory.mode}{'*' if memory is plan.configured else ''}" for memory in plan.memory]
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, cells: Sequence[str]) -> None:
        rows.append((name, list(cells)))

    unit, bytes_of_it = ("GB", GB) if plan.configured.peak.total >= GB else ("MB", 10**6)

    def sizes(name: str, of: Sequence[int]) -> None:
        add(name, [f"{size / bytes_of_it:,.2f}" for size in of])

    memory = plan.memory
    sizes("weights, a shard", [one.shards.parameters for one in memory])
    sizes("gradients, a shard", [one.shards.gradients for one in memory])
    sizes("Adam's moments, a shard", [one.shards.optimizer for one in memory])
    sizes("activations kept for backward", [one.activations for one in memory])
    sizes("largest single tensor", [one.largest_temporary for one in memory])
    add("at the peak:", [])
    sizes("  shards so far", [one.peak.shards for one in memory])
    sizes("  gathered weights", [one.peak.gathered for one in memory])
    sizes("  gradients before their sum", [one.peak.unsummed for one in memory])
    sizes("  activations", [one.peak.activations for one in memory])
    sizes("  temporary", [one.peak.temporary for one in memory])
    sizes("peak", [one.peak.total for one in memory])
    add(f"of {plan.gpu.memory_gb:g} GB", [_of(one, plan) for one in memory])
    notes = [
        f"  {one.mode}{'*' if one is plan.configured else ''}: the peak is in {one.peak.when}"
        for one in memory
    ]
    heading = f"memory of a rank, {unit}; recomputing"
    return "\n".join([table(heading, columns, rows), *notes, "  * as configured"])


def _of(memory: Memory, plan: Plan) -> str:
    return f"{memory.peak.total / GB / plan.gpu.memory_gb:.0%}"


def _collectives(plan: Plan) -> str:
    rows = [
        (f"{one.kind} over {one.ranks:,} ({one.group})", [f"{one.count:,}", in_units(one.bytes)])
        for one in plan.collectives
    ]
    return table("collectives of a rank in a step", ["number", "in all"], rows)


def _time(plan: Plan) -> str:
    time, gpu = plan.throughput, plan.gpu
    again = time.hardware_flops_per_token / time.model_flops_per_token
    rows = [
        ("FLOPs a token, of the model", f"{time.model_flops_per_token:.4g}"),
        ("FLOPs a token, of the hardware", f"{time.hardware_flops_per_token:.4g} (x {again:.2f})"),
        (
            "steps",
            f"{time.steps:,} of {time.tokens_per_step:,} tokens: {time.tokens / 1e9:,.1f} billion "
            "tokens",
        ),
    ]
    if time.step_seconds is None or time.days is None:
        rows.append(("a step", "unknown: no peak is known in fp32"))
    else:
        assumed = f"at an assumed MFU of {time.mfu:.1%} of {gpu.peak_flops / 1e12:g} TFLOP/s"
        seconds = (
            f"{time.step_seconds:,.0f}" if time.step_seconds >= 100 else f"{time.step_seconds:.3g}"
        )
        rows.append(("a step", f"{seconds} s {assumed}"))
        rows.append(("all steps", f"{time.days:,.1f} days, without saves, validation and failures"))
    return "\n".join(["time", *(f"  {name:{LABEL - 2}}{text}" for name, text in rows)])


def _checkpoint(plan: Plan) -> str:
    one, policy = plan.checkpoint, plan.config.checkpoint
    rows = [
        (
            "a save",
            f"{in_units(one.bytes)}; {in_units(one.bytes_per_rank)} from each of {one.ranks:,} "
            "ranks",
        ),
        (
            "on disk",
            f"{in_units(one.kept_bytes)} for the {one.kept:,} that are kept and the next one",
        ),
    ]
    if policy.milestone_every_steps:
        milestones = plan.throughput.steps // policy.milestone_every_steps
        rows.append(
            (
                "",
                f"{milestones:,} of them milestones, one every {policy.milestone_every_steps:,} "
                "steps",
            )
        )
    if policy.keep_hours:
        pace = "at the pace planned"
        if not plan.throughput.step_seconds:
            pace = "not counted: no step's time is known"
        rows.append(("", f"those of the last {policy.keep_hours:g} hours {pace}"))
    rows += [*_snapshots(plan), *_losses(plan)]
    return "\n".join(["checkpoint", *(f"  {name:{LABEL - 2}}{text}" for name, text in rows)])


def _snapshots(plan: Plan) -> list[tuple[str, str]]:
    """What the tiers cost that agents hold."""
    one, config, policy = plan.checkpoint, plan.config, plan.config.checkpoint
    takes = in_units(one.memory_bytes(config))
    if not policy.memory_every_steps:
        return [
            (
                "in memory",
                f"none (checkpoint.memory_every_steps=0); {policy.memory_keep} would take {takes} "
                "a node",
            )
        ]
    copied = config.cluster.nodes > 1
    beside = " and the next one; no node is there to copy to"
    if copied:
        beside = ", the next one, and a partner's as many"
    rows = [("in memory", f"{takes} of each node's, for {policy.memory_keep} snapshots{beside}")]
    if copied:
        rows.append(
            (
                "",
                f"{in_units(one.node_bytes)} from node to node every "
                f"{policy.memory_every_steps:,} steps",
            )
        )
    if policy.node_every_steps:
        kept = (
            f"{policy.node_keep} snapshots and the next one, one every "
            f"{policy.node_every_steps:,} steps"
        )
        rows.append(
            ("on the nodes' disks", f"{in_units(one.disk_bytes(config))} of each, for {kept}")
        )
    return rows


def _losses(plan: Plan) -> list[tuple[str, str]]:
    """The steps between two saves of a tier: what a failure loses at most, beside those of a save
    under way."""
    policy, seconds = plan.config.checkpoint, plan.throughput.step_seconds

    def lost(steps: int) -> str:
        if seconds is None:
            return f"{steps:,} steps"
        return f"{steps:,} steps ({steps * seconds / 60:,.1f} minutes)"

    rows = [
        ("lost work", f"up to {lost(policy.every_steps)} where a restart reads the file system")
    ]
    if policy.memory_every_steps:
        rows.append(("", f"up to {lost(policy.memory_every_steps)} where it finds a snapshot"))
    return rows


def _not_counted(plan: Plan) -> str:
    parallel = plan.config.parallel
    missing = ["CUDA's context", "NCCL's buffers", "fragmentation"]
    if parallel.compile:
        missing.append("what parallel.compile saves")
    lines = [f"not counted: {', '.join(missing)} (docs/plan.md)"]
    if parallel.engine != "fsdp2":
        lines.append(f"planned as with parallel.engine=fsdp2: {parallel.engine} is not modelled")
    return "\n".join(lines)
