"""A recipe named after a published size must be that size's published run, on a layout that can
hold it."""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from opt_logbook.record import journal, metrics
from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.compose import compose, configs_directory
from opt_train.config.run_config import RunConfig, from_json
from opt_train.optim.schedule import learning_rate
from opt_train.protocol.exits import BadInput

GIVEN = ["data.corpus=texts", "tokenizer.vocab_file=vocab.json", "tokenizer.merges_file=merges.txt"]
"""What a recipe cannot know."""

# By hand. Batch: arXiv 2205.01068, table 1, whose 0.5M, 1M, 2M and 4M are sequences of 2048 tokens;
# the 175B run had one for each of its 992 GPUs. LR: the same table. Tensor degree: `model_parallel`
# in facebookresearch/metaseq, metaseq/launcher/opt_job_constants.py.
PUBLISHED = {
    "opt-125m": (256, 6.0e-4, 1),
    "opt-350m": (256, 3.0e-4, 1),
    "opt-1.3b": (512, 2.0e-4, 1),
    "opt-2.7b": (512, 1.6e-4, 1),
    "opt-6.7b": (1024, 1.2e-4, 1),
    "opt-13b": (2048, 1.0e-4, 2),
    "opt-30b": (2048, 1.0e-4, 2),
    "opt-66b": (1024, 0.8e-4, 8),
    "opt-175b": (992, 1.2e-4, 8),
}
PARAMETERS = {
    "opt-125m": 0.125e9,
    "opt-350m": 0.331e9,
    "opt-1.3b": 1.316e9,
    "opt-2.7b": 2.652e9,
    "opt-6.7b": 6.658e9,
    "opt-13b": 12.853e9,
    "opt-30b": 29.975e9,
    "opt-66b": 65.720e9,
    "opt-175b": 174.604e9,
}
CONTEXT = 2048
TOKENS = 300_000_000_000
GPU_BYTES = 80e9


@pytest.fixture(params=PUBLISHED)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@functools.cache
def recipe(size: str, *changes: str) -> RunConfig:
    return compose([f"experiment={size}", *GIVEN, *changes])


def test_there_is_a_recipe_for_each_published_size() -> None:
    assert {path.stem for path in (configs_directory() / "experiment").glob("opt-*.yaml")} == set(
        PUBLISHED
    )


def test_a_recipe_is_the_published_run(size: str) -> None:
    config = recipe(size)
    batch, rate, _ = PUBLISHED[size]
    assert (config.name, config.model.name, config.tokenizer.name) == (size, size, "gpt2")
    assert (config.train.global_batch, config.data.sequence_length, config.optim.lr) == (
        batch,
        CONTEXT,
        rate,
    )
    assert (
        config.optim.beta1,
        config.optim.beta2,
        config.optim.weight_decay,
        config.optim.clip,
    ) == (0.9, 0.95, 0.1, 1)
    assert config.model.dropout == 0.1


def test_a_recipe_trains_for_300_billion_tokens_and_not_a_step_longer(size: str) -> None:
    config = recipe(size)
    batch_tokens = PUBLISHED[size][0] * CONTEXT
    assert TOKENS <= config.train.steps * batch_tokens < TOKENS + batch_tokens


def test_the_rate_falls_linearly_over_300_billion_tokens_to_a_tenth(size: str) -> None:
    config = recipe(size)
    peak, steps = PUBLISHED[size][1], math.ceil(TOKENS / (PUBLISHED[size][0] * CONTEXT))
    warm = config.optim.warmup_steps
    assert learning_rate(config.optim, warm - 1, config.train.steps) == pytest.approx(peak)
    assert learning_rate(config.optim, (steps + warm) // 2, config.train.steps) == pytest.approx(
        0.55 * peak, rel=1e-3
    )
    assert learning_rate(config.optim, steps - 1, config.train.steps) == pytest.approx(
        0.1 * peak, rel=1e-3
    )


def test_no_rank_of_a_recipe_is_ever_idle(size: str) -> None:
    """Every data-parallel rank reads as many sequences as every other, in whole micro-batches."""
    config = recipe(size)
    assert config.cluster.slots_per_node == 8
    data_ranks, rest = divmod(
        config.cluster.nodes * 8, config.parallel.tensor * config.parallel.replicate
    )
    assert rest == 0
    share, rest = divmod(config.train.global_batch, data_ranks * config.parallel.replicate)
    assert rest == 0
    assert share % config.train.micro_batch == 0


def test_a_tensor_group_is_as_published_and_stays_inside_a_node(size: str) -> None:
    config = recipe(size)
    assert config.parallel.tensor == PUBLISHED[size][2]
    assert config.cluster.slots_per_node % config.parallel.tensor == 0


def test_a_recipe_fits_into_its_gpus(size: str) -> None:
    """State by the bytes of docs/precision.md; what a block keeps, generously, at 34 bytes a number
    of its width (arXiv 2205.05198, section 4.1, without attention's scores, which are never
    kept)."""
    config = recipe(size)
    bytes_each = 12 if config.precision.weights == "fp16" else 16
    state = bytes_each * PARAMETERS[size] / config.world_size
    block = 34 * config.train.micro_batch * CONTEXT * config.model.d_model / config.parallel.tensor
    inputs = 2 * config.train.micro_batch * CONTEXT * config.model.d_model / config.parallel.tensor
    kept = config.model.layers * (
        inputs if config.parallel.activation_checkpointing == "full" else block
    )
    gathered = (
        4 * 12 * config.model.d_model**2 * 2 / config.parallel.tensor
        + 10 * 50272 * config.model.d_model
    )
    assert state + kept + block + gathered < 0.75 * GPU_BYTES


def test_a_recipe_has_spares_where_there_is_more_than_one_node(size: str) -> None:
    config = recipe(size)
    assert (config.cluster.buffer_nodes > 0) == (config.cluster.nodes > 1)


def test_opt_175b_is_laid_out_as_it_was() -> None:
    """arXiv 2205.01068, section 2.4: 992 GPUs, tensor parallelism 8, fp16 weights with Adam's state
    in fp32."""
    config = recipe("opt-175b")
    assert (config.cluster.nodes, config.world_size, config.parallel.tensor) == (124, 992, 8)
    assert (config.precision.compute, config.precision.weights, config.precision.loss_scale) == (
        "fp16",
        "fp16",
        "metaseq",
    )
    assert (config.parallel.activation_checkpointing, config.train.micro_batch) == ("full", 8)
    assert config.optim.warmup_steps == 2000


def test_a_recipe_says_all_that_must_be_added(size: str) -> None:
    with pytest.raises(BadInput) as refused:
        compose([f"experiment={size}"])
    assert str(refused.value) == (
        "data.corpus, tokenizer.vocab_file and tokenizer.merges_file have no value; give them, as "
        "data.corpus=texts "
        "tokenizer.vocab_file=vocab.json tokenizer.merges_file=merges.txt"
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            GIVEN[:1],
            "tokenizer.vocab_file and tokenizer.merges_file have no value; give them, as "
            "tokenizer.vocab_file=vocab.json tokenizer.merges_file=merges.txt",
        ),
        (
            GIVEN[:2],
            "tokenizer.merges_file has no value; GPT-2's vocabulary needs both files, vocab and "
            "merges",
        ),
        (
            GIVEN[1:],
            "data.corpus has no value; give a file, a folder or a glob, as data.corpus=texts",
        ),
    ],
)
def test_what_was_given_already_is_not_asked_for_again(given: list[str], sentence: str) -> None:
    with pytest.raises(BadInput) as refused:
        compose(["experiment=opt-125m", *given])
    assert str(refused.value) == sentence


@pytest.mark.parametrize("size", ["opt-1.3b", "opt-2.7b"])
def test_the_sizes_that_say_so_compose_for_one_machine(size: str) -> None:
    config = recipe(size, "cluster.nodes=1", "cluster.buffer_nodes=0")
    assert config.train.global_batch % (8 * config.train.micro_batch) == 0


SHRUNK = (
    "model=tiny",
    "model.vocab_size=264",
    "model.positions=32",
    "data.sequence_length=32",
    "data.validation_fraction=0.2",
    "parallel.compile=false",
    "train.device=cpu",
    "train.threads=1",
    "train.steps=4",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.validate_every=2",
    "optim.warmup_steps=2",
    "checkpoint.every_steps=2",
    "cluster.nodes=1",
    "cluster.slots_per_node=2",
    "cluster.buffer_nodes=0",
)
"""What makes a recipe train on two cores: the size, the length, the layout. The rest stays the
recipe's."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes"), [("opt-125m", ()), ("opt-175b", ("parallel.tensor=2",))]
)
def test_a_shrunk_recipe_trains_to_its_end(
    size: str, changes: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(20):
        words = (f"the {number * i % 61} other th{i % 7}n" for i in range(120))
        (tmp_path / "texts" / f"{number}.txt").write_text(" ".join(words))
    write_gpt2_files(tmp_path)
    command = [
        sys.executable,
        "-m",
        "opt_train.cli.main",
        "run",
        f"experiment={size}",
        *GIVEN,
        *SHRUNK,
        *changes,
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDirectory(tmp_path / "runs" / size)
    entries = journal.read(run.journal).entries
    kinds = [entry.event.kind for entry in entries]
    assert kinds[-1] == "run_finished"
    assert kinds.count("checkpoint_committed") == kinds.count("validation") == 2
    assert "incident_diagnosed" not in kinds
    lines = metrics.read(run).lines
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) for line in lines)
    trained = from_json(run.config_json)
    assert (trained.optim.lr, trained.precision) == (PUBLISHED[size][1], recipe(size).precision)
    assert (
        trained.parallel.activation_checkpointing == recipe(size).parallel.activation_checkpointing
    )


def write_gpt2_files(folder: Path) -> None:
    """A vocabulary of GPT-2's form: its 256 bytes and two merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    entries = [*sorted(ByteLevel.alphabet()), "th", "the"]
    (folder / "vocab.json").write_text(
        json.dumps({entry: number for number, entry in enumerate(entries)})
    )
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
