"""`opt-train plan`: what a run would need, by arithmetic and, where asked, by a rehearsal. It
starts nothing."""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from opt_train.cli.jobs import UNREAD, compose_jobs, print_configurations
from opt_train.config.run_config import RunConfig
from opt_train.config.sentences import listed
from opt_train.plan.comparison import (
    TOLERANCE,
    Comparison,
    compare_collectives,
    compare_memory,
    reason_for_difference,
)
from opt_train.plan.page import in_units, page, table
from opt_train.plan.plan import Plan, plan_of
from opt_train.plan.refusals import refusals
from opt_train.plan.throughput import GPUS, OPT_MFU, Gpu
from opt_train.protocol.exits import DONE, NO, BadInput


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the flags ask for."""

    gpu: Gpu
    mfu: float
    tokens: int | None
    rehearse: bool
    allow_idle: bool
    as_json: bool
    as_list: bool
    """JSON of a multirun is a list, of however many plans."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `opt-train plan`."""
    parser.add_argument("--json", action="store_true", help="print JSON for a program")
    parser.add_argument(
        "--gpu", default="A100", metavar="NAME", help=f"{listed(list(GPUS))}; by default A100"
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        metavar="GB",
        help="of a GPU, in 10^9 bytes; by default as it is sold",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=OPT_MFU,
        metavar="PART",
        help="to assume; by default OPT-175B's 0.353",
    )
    parser.add_argument(
        "--tokens", type=float, metavar="N", help="to train on; by default what train.steps makes"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run a step with tensors without contents, and compare",
    )
    parser.add_argument(
        "--allow-idle",
        action="store_true",
        help="accept that more than 10%% of the work is padding",
    )


def options_of(flags: argparse.Namespace) -> PlanOptions:
    """The flags, checked.

    Raises:
        BadInput: a value cannot be.
    """
    gpu, memory_gb, mfu, tokens = flags.gpu, flags.memory_gb, flags.mfu, flags.tokens
    if gpu not in GPUS:
        raise BadInput(
            f"--gpu={gpu} is not known; use {listed(list(GPUS))}, with --memory-gb for another "
            "memory"
        )
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise BadInput(f"--memory-gb={memory_gb:g} is no size of a memory; give one like 80")
    if not 0 < mfu <= 1:
        raise BadInput(f"--mfu={mfu:g} is no part of the peak; give one like 0.353")
    if tokens is not None and not 1 <= tokens < math.inf:
        raise BadInput(f"--tokens={tokens:g} is no number of tokens; give one like 300e9")
    device = GPUS[gpu] if memory_gb is None else replace(GPUS[gpu], memory_gb=memory_gb)
    return PlanOptions(
        gpu=device,
        mfu=mfu,
        tokens=None if tokens is None else int(tokens),
        rehearse=flags.rehearse,
        allow_idle=flags.allow_idle,
        as_json=flags.json,
        as_list=flags.multirun,
    )


def run(flags: argparse.Namespace) -> int:
    """Print what each job would need; unlike a verb that trains, it reads neither corpus nor
    tokenizer, and its flags hold for every job.

    Raises:
        BadInput: an override or a flag is wrong.
    """
    if flags.cfg:
        return print_configurations(compose_jobs(flags, flags.overrides), flags.multirun)
    jobs = compose_jobs(flags, [*UNREAD, *flags.overrides])
    return plan([job.config for job in jobs], options_of(flags))


def plan(configs: Sequence[RunConfig], options: PlanOptions) -> int:
    """Print the plan of each of `configs`; 1 where one of them should not start as it is."""
    code, payloads = DONE, []
    for number, config in enumerate(configs):
        made = plan_of(config, options.gpu, options.mfu, options.tokens)
        against = refusals(made, options.allow_idle)
        if not options.as_json:
            print("\n\n" * bool(number) + page(made), flush=True)
        compared = _compare(made) if options.rehearse else None
        if options.as_json:
            payloads.append(_payload(made, against, compared))
        elif compared is not None:
            print(f"\n{_comparison_page(made, compared)}", flush=True)
        for sentence in against:
            print(f"opt-train: {config.name}: {sentence}", file=sys.stderr, flush=True)
            code = NO
    if options.as_json:
        print(json.dumps(payloads if options.as_list else payloads[0], indent=2))
    return code


# Rehearsals ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compared:
    """A plan's figures beside those of its rehearsals."""

    memory: Mapping[str, list[Comparison]]
    """By mode of activation checkpointing."""
    collectives: list[Comparison]
    """Under the mode that is configured."""
    rehearsals: Mapping[str, Mapping[str, Any]]


def _compare(made: Plan) -> Compared:
    rehearsals = dict(zip((one.mode for one in made.memory), _rehearse(made), strict=True))
    return Compared(
        {one.mode: compare_memory(one, rehearsals[one.mode]) for one in made.memory},
        compare_collectives(made.collectives, rehearsals[made.configured.mode]),
        rehearsals,
    )


def _rehearse(made: Plan) -> list[Mapping[str, Any]]:
    """Each mode's rehearsal, in a process that may import torch.

    Raises:
        BadInput: it failed.
    """
    parallel = made.config.parallel
    configs = [
        replace(made.config, parallel=replace(parallel, activation_checkpointing=one.mode))
        for one in made.memory
    ]
    # -P: a file of the user's that is called torch.py is not the library.
    command = [sys.executable, "-P", "-m", "opt_train.rehearsal.rehearse"]
    text = json.dumps([asdict(config) for config in configs])
    ended = subprocess.run(command, input=text, text=True, stdout=subprocess.PIPE, check=False)
    if ended.returncode != 0:
        raise BadInput("the rehearsal failed, as said above; plan without --rehearse")
    return [json.loads(line) for line in ended.stdout.splitlines()]


def _comparison_page(made: Plan, compared: Compared) -> str:
    columns = ["arithmetic", "rehearsed", "difference"]
    parts = []
    for mode, rows in compared.memory.items():
        heading = f"memory, recomputing {mode}{'*' if mode == made.configured.mode else ''}"
        parts.append(table(heading, columns, [_cells(row) for row in rows]))
    parts.append(
        table("collectives in a step", columns, [_cells(row) for row in compared.collectives])
    )
    rows = [row for one in compared.memory.values() for row in one] + compared.collectives
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row.agrees:
            reasons.setdefault(reason_for_difference(row, made.config), []).append(row.what)
    for why, which in reasons.items():
        parts.append(
            f"{'; '.join(dict.fromkeys(which))}: differ by more than {TOLERANCE:.0%}, because {why}"
        )
    return "\n\n".join(
        parts if reasons else [*parts, f"nothing differs by more than {TOLERANCE:.0%}"]
    )


def _cells(row: Comparison) -> tuple[str, list[str]]:
    numbers = [f"{n:,}" if row.is_count else in_units(n) for n in (row.planned, row.rehearsed)]
    return row.what, [*numbers, "" if row.difference is None else f"{row.difference:+.1%}"]


def _payload(made: Plan, against: list[str], compared: Compared | None) -> dict[str, Any]:
    config, fewer = made.config, made.without_a_node
    payload: dict[str, Any] = {
        "name": config.name,
        "model": config.model.name,
        "parameters": made.parameters,
        "nodes": config.cluster.nodes,
        "world_size": made.layout.world_size,
        "layout": asdict(made.layout),
        "precision": {"compute": config.precision.compute, "weights": config.precision.weights},
        "activation_checkpointing": made.configured.mode,
        "gpu": asdict(made.gpu),
        "fits": made.fits,
        "refusals": against,
        "batch": asdict(made.batch),
        "idle_share": made.batch.idle_share,
        "idle_share_without_a_node": None if fewer is None else fewer.idle_share,
        "memory": [asdict(one) | {"peak_bytes": one.peak.total} for one in made.memory],
        "collectives": [asdict(one) for one in made.collectives],
        "throughput": asdict(made.throughput) | {"tokens": made.throughput.tokens},
        "checkpoint": asdict(made.checkpoint),
    }
    if compared is not None:
        memory = [(mode, row) for mode, rows in compared.memory.items() for row in rows]
        rows = [*memory, *((made.configured.mode, row) for row in compared.collectives)]
        payload["rehearsals"] = dict(compared.rehearsals)
        payload["comparison"] = [
            {"mode": mode, **asdict(row), "difference": row.difference}
            | ({} if row.agrees else {"reason": reason_for_difference(row, config)})
            for mode, row in rows
        ]
    return payload
