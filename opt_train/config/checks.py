"""What must hold between the keys of one configuration, and between it and this machine. Every
failure is a sentence with the key and the fix. What a value must be by itself stands beside its key
(`opt_train.protocol.keys`)."""

import importlib.util
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from opt_train.config.keys import obey_laws
from opt_train.config.sentences import listed
from opt_train.data.named_sets import named_sets
from opt_train.optim.loss_scale_policy import CEILING, SMALLEST, policy_of
from opt_train.protocol.exits import BadInput
from opt_train.supervisor import stability_modes
from opt_train.supervisor.modes import modes_of

if TYPE_CHECKING:
    from opt_train.config.run_config import RunConfig

EXAMPLE_FILES = {
    "data.corpus": "texts",
    "tokenizer.vocab_file": "vocab.json",
    "tokenizer.merges_file": "merges.txt",
}

SMALLEST_BPE = 260
"""The 256 bytes and OPT's four special tokens."""


def check(config: "RunConfig") -> None:
    """Refuse what cannot run.

    Raises:
        BadInput: the first rule that does not hold.
    """
    # First: the rules below divide by values that these laws keep above 0.
    obey_laws(config)
    _model_and_data(config)
    _tensor(config)
    _batches(config)
    _layout(config)
    _engine(config)
    _tensor_groups(config)
    _precision(config)
    _cluster(config)
    _checkpoints(config)
    _tiers(config)
    modes_of(config.supervisor.modes)
    stability_modes.modes_of(config.stability.modes)
    if config.optim.warmup_steps >= config.train.steps:
        raise BadInput(
            f"optim.warmup_steps={config.optim.warmup_steps} must be smaller than "
            f"train.steps={config.train.steps}; "
            "warm up for less or train for longer"
        )
    if (config.optim.schedule == "wsd") != (config.optim.cooldown_steps > 0):
        raise BadInput(
            f"optim.schedule={config.optim.schedule} does not go with "
            f"optim.cooldown_steps={config.optim.cooldown_steps}: give wsd the steps within which "
            "it decays, and no other schedule any"
        )
    if 0 < config.optim.decay_steps <= config.optim.warmup_steps:
        raise BadInput(
            f"optim.decay_steps={config.optim.decay_steps} must be larger than "
            f"optim.warmup_steps={config.optim.warmup_steps}, which it includes; 0 means "
            "train.steps"
        )


def fits_on(config: "RunConfig", nodes: int) -> bool:
    """Whether this configuration can train on `nodes` nodes, fewer than its own, at the same global
    batch."""
    # Fewer ranks have larger shares of the batch: what holds of it for more holds for them.
    try:
        _layout(replace(config, cluster=replace(config.cluster, nodes=nodes)))
    except BadInput:
        return False
    return True


def _model_and_data(config: "RunConfig") -> None:
    model, data, tokenizer = config.model, config.data, config.tokenizer
    if model.d_model % model.heads:
        near = _nearest_divisors(model.d_model, model.heads)
        raise BadInput(
            f"model.heads={model.heads} must divide model.d_model={model.d_model}; use {near}"
        )
    if data.sequence_length > model.positions:
        raise BadInput(
            f"data.sequence_length={data.sequence_length} is longer than "
            f"model.positions={model.positions}; "
            f"use data.sequence_length={model.positions} or fewer, or more positions"
        )
    _files(config)
    named_sets(data)
    if tokenizer.vocab_file:
        return
    if tokenizer.vocab_size < SMALLEST_BPE:
        raise BadInput(
            f"tokenizer.vocab_size={tokenizer.vocab_size} is too small for a byte-level "
            "vocabulary; "
            f"use {SMALLEST_BPE} or more"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise BadInput(
            f"tokenizer.vocab_size={tokenizer.vocab_size} is larger than "
            f"model.vocab_size={model.vocab_size}; "
            f"train fewer entries or set model.vocab_size={tokenizer.vocab_size}"
        )


def _files(config: "RunConfig") -> None:
    """What only the user has: text, and GPT-2's two files where they are asked for. One sentence
    names all of it."""
    tokenizer = config.tokenizer
    both = {
        "tokenizer.vocab_file": tokenizer.vocab_file,
        "tokenizer.merges_file": tokenizer.merges_file,
    }
    wanted = {"data.corpus": config.data.corpus}
    if tokenizer.name == "gpt2" or any(both.values()):
        wanted |= both
    match [key for key, value in wanted.items() if not value]:
        case []:
            pass
        case ["data.corpus"]:
            raise BadInput(
                "data.corpus has no value; give a file, a folder or a glob, as data.corpus=texts"
            )
        case [key]:
            raise BadInput(
                f"{key} has no value; GPT-2's vocabulary needs both files, vocab and merges"
            )
        case missing:
            examples = " ".join(f"{key}={EXAMPLE_FILES[key]}" for key in missing)
            raise BadInput(f"{listed(missing, 'and')} have no value; give them, as {examples}")


def _batches(config: "RunConfig") -> None:
    ranks = max(1, config.world_size // config.parallel.tensor)
    if config.train.global_batch < ranks:
        raise BadInput(
            f"train.global_batch={config.train.global_batch} leaves some of {ranks} data-parallel "
            "ranks without a "
            f"sequence; use {ranks} or more, or fewer nodes"
        )
    # Shares may be unequal (padding has weight 0): a run that loses one node of 124 idles
    # a tenth of its work, and not half.
    share = -(-config.train.global_batch // ranks)
    if config.train.micro_batch > share:
        raise BadInput(
            f"train.micro_batch={config.train.micro_batch} is more than the {share} sequences a "
            "rank gets of "
            f"train.global_batch={config.train.global_batch}; use {share} or fewer"
        )


def _layout(config: "RunConfig") -> None:
    parallel, world = config.parallel, config.world_size
    nodes = (
        f"cluster.nodes={config.cluster.nodes} x "
        f"cluster.slots_per_node={config.cluster.slots_per_node}"
    )
    fixed = parallel.replicate * parallel.tensor
    if parallel.shard == 0:
        if world % fixed:
            raise BadInput(
                f"parallel.replicate={parallel.replicate} x parallel.tensor={parallel.tensor} "
                "must divide the "
                f"{world} ranks of {nodes}; change the degrees or the nodes"
            )
    elif fixed * parallel.shard != world:
        raise BadInput(
            f"parallel.replicate={parallel.replicate} x parallel.shard={parallel.shard} x "
            f"parallel.tensor={parallel.tensor} = {fixed * parallel.shard} must equal the {world} "
            f"ranks of {nodes}; "
            "parallel.shard=0 fills in what fits"
        )


def _engine(config: "RunConfig") -> None:
    """What the engines beside torch's own need, and what they cannot do."""
    parallel = config.parallel
    engine = parallel.engine
    if engine == "fsdp2":
        return
    for key in ("replicate", "tensor"):
        if (degree := getattr(parallel, key)) != 1:
            raise BadInput(
                f"parallel.engine={engine} shards over all ranks and knows no "
                f"parallel.{key}={degree}; "
                f"use parallel.{key}=1, or parallel.engine=fsdp2"
            )
    if config.optim.fused == "apex":
        raise BadInput(
            f"parallel.engine={engine} updates with torch's AdamW, not optim.fused=apex; use "
            "optim.fused=auto"
        )
    # fairscale 0.4.13 assumes CUDA streams, and a shape of reduce-scatter that gloo refuses.
    if engine == "fairscale" and config.train.device == "cpu":
        raise BadInput(
            "parallel.engine=fairscale needs GPUs, and train.device=cpu has none; use "
            "parallel.engine=fsdp2"
        )
    if engine == "deepspeed":
        _deepspeed(config)
    if importlib.util.find_spec(engine) is None:
        raise BadInput(
            f"parallel.engine={engine} is not installed; pip install 'opt-train[{engine}]'"
        )


def _deepspeed(config: "RunConfig") -> None:
    """What ZeRO cannot do, all or some of its stages."""
    parallel, stage = config.parallel, config.parallel.zero_stage
    if stage not in (1, 2, 3):
        raise BadInput(f"parallel.zero_stage={stage} is not possible; use 1, 2 or 3")
    if config.precision.compute == "fp16":
        raise BadInput(
            "parallel.engine=deepspeed computes in fp32 or bf16, not in precision.compute=fp16; "
            "use parallel.engine=fsdp2 or fairscale"
        )
    if stage == 3 and parallel.compile:
        raise BadInput(
            "parallel.compile=true cannot look through the hooks that parallel.zero_stage=3 puts "
            "into each layer; "
            "use parallel.compile=false or parallel.zero_stage=2"
        )
    if stage > 1 and parallel.accumulate == "whole":
        raise BadInput(
            f"parallel.accumulate=whole goes with parallel.zero_stage=1, because stage {stage} "
            "sums over ranks after "
            "each micro-batch; use parallel.accumulate=shards"
        )


def _precision(config: "RunConfig") -> None:
    precision = config.precision
    if precision.weights == "fp16" and precision.compute != "fp16":
        raise BadInput(
            f"precision.weights=fp16 goes with precision.compute=fp16, not {precision.compute}; "
            "use precision.weights=fp32"
        )
    if precision.weights == "fp16" and config.optim.fused == "apex":
        raise BadInput(
            "optim.fused=apex updates fp32 weights, not those of precision.weights=fp16; use "
            "optim.fused=auto"
        )
    for key in ("loss_scale_initial", "loss_scale_floor"):
        scale = getattr(precision, key)
        if scale and not SMALLEST <= scale <= CEILING:
            raise BadInput(
                f"precision.{key}={scale:g} is no scale that moves in fp32; use one between "
                f"{SMALLEST:g} and "
                f"{CEILING:g}"
            )
    policy = policy_of(precision)
    if policy.floor > policy.initial:
        raise BadInput(
            f"precision.loss_scale_floor={policy.floor:g} is above the first step's scale, "
            f"{policy.initial:g}; "
            "lower it, or raise precision.loss_scale_initial"
        )


def _tensor(config: "RunConfig") -> None:
    """What a tensor group splits must split evenly."""
    degree, model = config.parallel.tensor, config.model
    # Whole heads and rows a rank, as Megatron-LM splits them (arXiv 1909.08053). The sequence too:
    # between the layers each rank has a part of it (sequence parallelism, arXiv 2205.05198).
    split = {
        "model.heads": model.heads,
        "model.ffn": model.ffn,
        "model.vocab_size": model.vocab_size,
        "model.embed_dim": model.embed_dim or model.d_model,
        "data.sequence_length": config.data.sequence_length,
    }
    for key, size in split.items():
        if size % degree:
            divisors = [
                n for n in range(1, size + 1) if all(each % n == 0 for each in split.values())
            ]
            raise BadInput(
                f"parallel.tensor={degree} must divide {key}={size}; use {listed(divisors)}"
            )


def _tensor_groups(config: "RunConfig") -> None:
    """The ranks of a tensor group wait for each other in every layer: they share a node."""
    degree, slots = config.parallel.tensor, config.cluster.slots_per_node
    if slots % degree:
        fitting = [
            n for n in range(1, min(degree, slots) + 1) if degree % n == 0 and slots % n == 0
        ]
        raise BadInput(
            f"parallel.tensor={degree} must divide cluster.slots_per_node={slots}, because the "
            "ranks that compute one "
            f"layer are of one node; use {listed(fitting)}, or cluster.slots_per_node={degree}"
        )


def _cluster(config: "RunConfig") -> None:
    """What would make every rank fail, and look like nodes that do."""
    module, interface = config.cluster.rank_module, config.cluster.interface
    if config.cluster.min_nodes > config.cluster.nodes:
        raise BadInput(
            f"cluster.min_nodes={config.cluster.min_nodes} is more than "
            f"cluster.nodes={config.cluster.nodes}; use that or fewer"
        )
    try:
        found = importlib.util.find_spec(module)
    # ValueError: a module that has no spec, as `__main__`; ImportError: its package is missing.
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise BadInput(
            f"cluster.rank_module={module} cannot be imported; the trainer is opt_train.train.warm"
        )
    # Only for ranks on this machine: a login node's interfaces are not those of the nodes.
    names = [name for _, name in socket.if_nameindex()]
    if config.cluster.kind == "local" and interface and interface not in names:
        raise BadInput(
            f"cluster.interface={interface} is no network interface here; use one of "
            f"{', '.join(names)}"
        )


def _checkpoints(config: "RunConfig") -> None:
    every, milestones = config.checkpoint.every_steps, config.checkpoint.milestone_every_steps
    if milestones % every:
        near = _multiples_near(milestones, every)
        raise BadInput(
            f"checkpoint.milestone_every_steps={milestones} must be a multiple of "
            f"checkpoint.every_steps={every}, or "
            f"milestones would not be saved; use {listed(near)}, or 0 for none"
        )


def _tiers(config: "RunConfig") -> None:
    memory, node = config.checkpoint.memory_every_steps, config.checkpoint.node_every_steps
    if node and (not memory or node % memory):
        fix = "set checkpoint.memory_every_steps too"
        if memory:
            fix = f"use {listed(_multiples_near(node, memory))}"
        raise BadInput(
            f"checkpoint.node_every_steps={node} must be a multiple of "
            f"checkpoint.memory_every_steps={memory}: what "
            f"goes to a node's disk comes from its memory; {fix}, or 0 for none"
        )


def _multiples_near(number: int, of: int) -> list[int]:
    return [near for near in (number // of * of, -(-number // of) * of) if near]


def _nearest_divisors(number: int, wanted: int) -> str:
    below = next(n for n in range(min(wanted, number), 0, -1) if number % n == 0)
    above = next((n for n in range(wanted, min(2 * wanted, number) + 1) if number % n == 0), below)
    return listed(sorted({below, above}))
