"""Configurations that could only fail later, on a cluster, must fail now."""

import pytest

from opt_train.config.compose import compose, expand
from opt_train.protocol.exits import BadInput


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["cluster.nodes=3", "parallel.replicate=2"],
            "parallel.replicate=2 x parallel.tensor=1 must divide the 3 ranks of cluster.nodes=3 x "
            "cluster.slots_per_node=1; change the degrees or the nodes",
        ),
        (
            ["parallel.shard=2"],
            "parallel.replicate=1 x parallel.shard=2 x parallel.tensor=1 = 2 must equal the 1 "
            "ranks of cluster.nodes=1 x "
            "cluster.slots_per_node=1; parallel.shard=0 fills in what fits",
        ),
        (
            ["cluster.nodes=2", "parallel.tensor=2"],
            "parallel.tensor=2 must divide cluster.slots_per_node=1, because the ranks that "
            "compute one layer are of one "
            "node; use 1, or cluster.slots_per_node=2",
        ),
        (
            ["cluster.nodes=2", "cluster.slots_per_node=6", "parallel.tensor=4"],
            "parallel.tensor=4 must divide cluster.slots_per_node=6, because the ranks that "
            "compute one layer are of one "
            "node; use 1 or 2, or cluster.slots_per_node=4",
        ),
        # What splits unevenly is said before the batch, whose ranks it decides.
        (
            ["parallel.tensor=5", "train.global_batch=4", "cluster.slots_per_node=5"],
            "parallel.tensor=5 must divide model.heads=12; use 1, 2 or 4",
        ),
        (
            ["train.global_batch=3", "train.micro_batch=1", "cluster.nodes=4"],
            "train.global_batch=3 leaves some of 4 data-parallel ranks without a sequence; use 4 "
            "or more, or fewer nodes",
        ),
        (
            ["train.global_batch=16", "cluster.nodes=4"],
            "train.micro_batch=8 is more than the 4 sequences a rank gets of "
            "train.global_batch=16; use 4 or fewer",
        ),
        (
            ["optim.warmup_steps=1000"],
            "optim.warmup_steps=1000 must be smaller than train.steps=1000; warm up for less or "
            "train for longer",
        ),
        (
            ["optim.decay_steps=700"],
            "optim.decay_steps=700 must be larger than optim.warmup_steps=715, which it includes; "
            "0 means train.steps",
        ),
        (
            ["optim.schedule=wsd"],
            "optim.schedule=wsd does not go with optim.cooldown_steps=0: give wsd the steps within "
            "which it decays, and no other schedule any",
        ),
        (
            ["optim.schedule=cosine", "optim.cooldown_steps=9"],
            "optim.schedule=cosine does not go with optim.cooldown_steps=9: give wsd the steps "
            "within which it decays, and no other schedule any",
        ),
        (
            ["checkpoint.milestone_every_steps=700"],
            "checkpoint.milestone_every_steps=700 must be a multiple of "
            "checkpoint.every_steps=500, or milestones would "
            "not be saved; use 500 or 1000, or 0 for none",
        ),
        (
            ["checkpoint.milestone_every_steps=7"],
            "checkpoint.milestone_every_steps=7 must be a multiple of checkpoint.every_steps=500, "
            "or milestones would "
            "not be saved; use 500, or 0 for none",
        ),
        (
            ["checkpoint.memory_every_steps=20", "checkpoint.node_every_steps=50"],
            "checkpoint.node_every_steps=50 must be a multiple of "
            "checkpoint.memory_every_steps=20: what goes to a "
            "node's disk comes from its memory; use 40 or 60, or 0 for none",
        ),
        (
            ["checkpoint.node_every_steps=50"],
            "checkpoint.node_every_steps=50 must be a multiple of "
            "checkpoint.memory_every_steps=0: what goes to a node's "
            "disk comes from its memory; set checkpoint.memory_every_steps too, or 0 for none",
        ),
        (["checkpoint.keep_hours=-1"], "checkpoint.keep_hours=-1.0 must not be negative"),
        (["optim.beta2=1.0"], "optim.beta2=1.0 must be at least 0 and below 1"),
        (
            ["optim.final_fraction=1.5"],
            "optim.final_fraction=1.5 must be at most 1, a part of the peak",
        ),
        (["model.layer_norm=both"], "model.layer_norm=both is not possible; use pre or post"),
        (["model.embed_dim=-1"], "model.embed_dim=-1 must not be negative"),
        (["train.steps=0"], "train.steps=0 must be larger than 0"),
        (
            ["cluster.nodes=2", "cluster.min_nodes=3"],
            "cluster.min_nodes=3 is more than cluster.nodes=2; use that or fewer",
        ),
        (["cluster.buffer_nodes=-1"], "cluster.buffer_nodes=-1 must not be negative"),
        (
            ["tokenizer.vocab_size=100"],
            "tokenizer.vocab_size=100 is too small for a byte-level vocabulary; use 260 or more",
        ),
        (["runs="], 'runs="" is no folder; give one like runs=runs'),
    ],
)
def test_rooms_that_do_not_fit_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(BadInput) as refused:
        compose(overrides)
    assert str(refused.value) == expected


def test_an_uneven_number_of_sequences_a_rank_is_allowed() -> None:
    # Losing one node of 124 must not cost half the batch: ranks may take unequal numbers of
    # micro-batches.
    assert (
        compose(["train.global_batch=992", "cluster.nodes=123", "train.micro_batch=1"]).world_size
        == 123
    )


def test_a_multirun_is_the_cross_product_in_hydras_order() -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = [
        "model=tiny,demo",
        "seed=range(1,4)",
        "optim.lr=choice(1e-3,2e-3)",
        'name="a b"',
        "train.steps=9",
    ]
    reference = BasicSweeper.split_arguments(
        OverridesParser.create().parse_overrides(overrides), None
    )
    assert expand(overrides) == [list(job) for batch in reference for job in batch]
    assert len(expand(overrides)) == 12


def test_a_glob_sweeps_over_the_choices_of_a_group() -> None:
    assert expand(["model=glob(opt-1*,exclude=*b)"]) == [["model=opt-125m"]]


def test_an_interval_has_no_values_to_sweep_over() -> None:
    with pytest.raises(BadInput, match=r"optim.lr sweeps over an interval, .* optim.lr=1,2,3"):
        expand(["optim.lr=interval(0,1)"])
