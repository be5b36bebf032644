"""What the released OPT models reach on public tasks, to compare a checkpoint of the same size
with."""

from collections.abc import Mapping

from opt_train.model.config import ModelConfig

SOURCE = "EleutherAI/lm-evaluation-harness, results/opt"
"""Where each number stands, in `opt-SIZE/opt-SIZE.json`."""

CONDITIONS = "no shots, accuracies not normalised by length, version 0 of each task"
"""As those files say: `num_fewshot`, `acc` beside `acc_norm`, `versions`."""

# The harness has renamed tasks and changed their versions since; these are as it printed them then.
SHOTS = 0

LAMBADA_PERPLEXITY = ("lambada_openai", "perplexity")
MEASURED = (
    LAMBADA_PERPLEXITY,
    ("lambada_openai", "acc"),
    ("piqa", "acc"),
    ("arc_easy", "acc"),
    ("arc_challenge", "acc"),
    ("winogrande", "acc"),
    ("sciq", "acc"),
)
"""Task and metric of each column below, by the names that the harness has today."""

TASKS = tuple(dict.fromkeys(task for task, _ in MEASURED))

# Perplexity of a word; the others in percent.
PUBLISHED: Mapping[str, tuple[float, ...]] = {
    "opt-125m": (26.02, 37.90, 63.00, 43.52, 18.94, 50.28, 75.10),
    "opt-350m": (16.40, 45.16, 64.36, 44.02, 20.73, 52.33, 74.80),
    "opt-1.3b": (6.64, 57.93, 71.71, 57.03, 23.12, 59.75, 84.50),
    "opt-2.7b": (5.12, 63.59, 73.88, 60.77, 26.79, 61.01, 85.80),
    "opt-6.7b": (4.25, 67.71, 76.28, 65.61, 30.55, 65.27, 90.10),
    "opt-13b": (4.04, 68.64, 75.95, 67.09, 32.94, 65.19, 90.80),
    "opt-30b": (3.63, 71.45, 77.58, 69.99, 34.64, 68.19, 91.10),
    "opt-66b": (3.29, 73.90, 78.78, 71.68, 37.20, 68.75, 92.60),
}

SHAPES: Mapping[str, tuple[int, int, int]] = {
    "opt-125m": (12, 12, 768),
    "opt-350m": (24, 16, 1024),
    "opt-1.3b": (24, 32, 2048),
    "opt-2.7b": (32, 32, 2560),
    "opt-6.7b": (32, 32, 4096),
    "opt-13b": (40, 40, 5120),
    "opt-30b": (48, 56, 7168),
    "opt-66b": (64, 72, 9216),
}
"""Layers, heads and `d_model` (arXiv 2205.01068, table 1); `ffn` is four times that. As the presets
have them."""

POST, POST_WIDTH = "opt-350m", 512
"""The one with its LayerNorms behind the residuals, and a narrower embedding."""


def published(size: str | None, task: str, metric: str) -> float | None:
    """What the released model of `size` has: accuracies between 0 and 1, as the harness gives them;
    None: unknown."""
    if size is None or size not in PUBLISHED or (task, metric) not in MEASURED:
        return None
    value = PUBLISHED[size][MEASURED.index((task, metric))]
    return value if (task, metric) == LAMBADA_PERPLEXITY else round(value / 100, 4)


def size_of(model: ModelConfig) -> str | None:
    """The published size that `model` is, as the presets name it; None: it is none.

    Its shape decides, whatever it is called. Vocabulary, positions and dropout may be its own.
    """
    for size, (layers, heads, d_model) in SHAPES.items():
        shape = (layers, heads, d_model, 4 * d_model)
        norm, width = ("post", POST_WIDTH) if size == POST else ("pre", d_model)
        found = (model.layers, model.heads, model.d_model, model.ffn)
        if (found, model.layer_norm, model.embedding_width) == (shape, norm, width):
            return size
    return None
