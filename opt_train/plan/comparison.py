"""A plan's arithmetic beside what a rehearsal counted, and why they differ where they do. Standard
library only."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opt_train.config.run_config import RunConfig
from opt_train.plan.collectives import Collective
from opt_train.plan.memory import Memory

TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of two origins; bytes, or a number of collectives."""

    what: str
    planned: int
    rehearsed: int
    is_count: bool = False

    @property
    def difference(self) -> float | None:
        """Of the plan, as a part of what was rehearsed; None where nothing was."""
        return self.planned / self.rehearsed - 1.0 if self.rehearsed else None

    @property
    def agrees(self) -> bool:
        return self.planned == self.rehearsed or (
            self.difference is not None and abs(self.difference) <= TOLERANCE
        )


def compare_memory(memory: Memory, rehearsal: Mapping[str, Any]) -> list[Comparison]:
    """`memory` beside the rehearsal of the same mode."""
    state = rehearsal["state"]
    return [
        Comparison("weights, a shard", memory.shards.parameters, state["parameters"]),
        Comparison("gradients, a shard", memory.shards.gradients, state["gradients"]),
        Comparison("Adam's moments, a shard", memory.shards.optimizer, state["optimizer"]),
        Comparison(
            "kept for backward, all of it", memory.kept_for_backward, rehearsal["kept_for_backward"]
        ),
        Comparison(
            "largest single tensor", memory.largest_temporary, rehearsal["largest_temporary"]
        ),
        Comparison("peak", memory.peak.total, rehearsal["peak"]),
    ]


def compare_collectives(
    collectives: Iterable[Collective], rehearsal: Mapping[str, Any]
) -> list[Comparison]:
    """Bytes and numbers by kind and size of the group, which is all that a rehearsal sees of a
    group."""
    planned_bytes: Counter[tuple[str, int]] = Counter()
    planned_count: Counter[tuple[str, int]] = Counter()
    for one in collectives:
        planned_bytes[one.kind, one.ranks] += one.bytes
        planned_count[one.kind, one.ranks] += one.count
    sent = {(row["kind"], row["ranks"]): row for row in rehearsal["collectives"]}
    rows = []
    for kind, ranks in sorted({*planned_bytes, *sent}):
        seen = sent.get((kind, ranks), {"bytes": 0, "count": 0})
        name = f"{kind} over {ranks:,}"
        rows.append(Comparison(f"{name}, bytes", planned_bytes[kind, ranks], seen["bytes"]))
        rows.append(
            Comparison(f"{name}, number", planned_count[kind, ranks], seen["count"], is_count=True)
        )
    return rows


def reason_for_difference(row: Comparison, config: RunConfig) -> str:
    """Why `row` differs, as far as it is known."""
    model, kind = config.model, row.what.partition(" ")[0]
    exchanged = model.embedding_width != model.d_model and config.parallel.tensor > 1
    if exchanged and kind in ("all_to_all", "all_gather"):
        return (
            "the projections between the embedding's width and the model's exchange sequence for "
            "columns, which is one "
            "all_to_all on a GPU, as planned, and an all_gather on the CPU of the rehearsal"
        )
    return "the arithmetic misses something: believe the rehearsal, and report the configuration"
