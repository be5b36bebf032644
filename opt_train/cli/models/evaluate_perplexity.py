"""`opt-train evaluate` without `--harness`: perplexity on the validation sets of a run's data."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from opt_train.cli.models.chosen_model import choose_device, load_model
from opt_train.cli.progress import report_count
from opt_train.data.batches import ValidationSet
from opt_train.data.manifest import HELD_OUT, DatasetManifest, check_fits
from opt_train.data.token_stream import open_split
from opt_train.evaluate.perplexity import MeanLoss, choose_sets, perplexity
from opt_train.protocol.exits import DONE
from opt_train.run.checkpoint_choice import CheckpointChoice


def evaluate(
    run: Path, checkpoint: str, sets: Sequence[str], as_json: bool, data: Path | None = None
) -> int:
    """Print the perplexity of a checkpoint on validation sets of its run's data.

    Args:
        sets: their names; empty: all that the data holds and that are long enough for this run.
        data: prepared data, for imported weights.
    """
    choice = CheckpointChoice(run, checkpoint, data)
    folder, dataset = choice.dataset()
    config = choice.config
    length = config.data.sequence_length
    device = choose_device(choice)
    check_fits(dataset, vocab_size=config.model.vocab_size, sequence_length=length)
    opened = {
        name: ValidationSet(open_split(folder, name, verify=True), length, name)
        for name in choose_sets(folder, dataset, sets, length)
    }
    model = load_model(choice, device, report_count("reading the checkpoint", "bytes"))
    measured = {
        name: perplexity(
            model,
            validation,
            micro_batch=config.train.micro_batch,
            device=device,
            progress=report_count(f"evaluated on {name}", "sequences"),
        )
        for name, validation in opened.items()
    }
    render = _as_json if as_json else _as_table
    print(render(choice, dataset, measured))
    return DONE


def _as_json(
    choice: CheckpointChoice, dataset: DatasetManifest, measured: Mapping[str, MeanLoss]
) -> str:
    payload = {
        "name": choice.name,
        "checkpoint": choice.checkpoint.path,
        "attempt": choice.checkpoint.attempt,
        "step": choice.checkpoint.step,
        "unigram_perplexity": dataset.unigram_perplexity,
        "sets": [
            {
                "name": name,
                "tokens": result.tokens,
                "loss": result.loss if math.isfinite(result.loss) else None,
                "perplexity": result.perplexity if math.isfinite(result.loss) else None,
            }
            for name, result in measured.items()
        ],
    }
    return json.dumps(payload, indent=2)


def _as_table(
    choice: CheckpointChoice, dataset: DatasetManifest, measured: Mapping[str, MeanLoss]
) -> str:
    width = max(len(name) for name in ("set", *measured))
    lines = [f"{choice.name} at step {choice.checkpoint.step}; loss in nats a token"]
    lines.append(f"{'set':{width}} {'tokens':>14} {'loss':>9} {'perplexity':>11}")
    for name, result in measured.items():
        lines.append(
            f"{name:{width}} {result.tokens:>14,} {result.loss:>9.4f} {result.perplexity:>11.2f}"
        )
    if HELD_OUT in measured:
        lines.append(
            f"a unigram model of the same data has {dataset.unigram_perplexity:.1f} on {HELD_OUT}"
        )
    return "\n".join(lines)
