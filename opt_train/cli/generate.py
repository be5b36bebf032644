"""`opt-train generate`: let a checkpoint go on with a text. It changes nothing in its run."""

import argparse

from opt_train.cli.checkpoint_flag import add_checkpoint_flag, add_data_flag


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `opt-train generate`."""
    parser.add_argument("prompt", metavar="PROMPT", help='text to go on with; "" begins a document')
    add_checkpoint_flag(parser)
    add_data_flag(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="by default 64, if the model has room for them",
    )
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token always")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="below 1: bet on likely tokens"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: from all"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest with P in all",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed draws the same text"
    )


def run(flags: argparse.Namespace) -> int:
    """Print the prompt and what the checkpoint makes of it.

    Raises:
        BadInput: prompt, flags and model do not go together.
    """
    # Imported here, as torch takes seconds that `--help` need not wait for.
    from opt_train.cli.models.generate_text import continue_text
    from opt_train.evaluate.generate import Sampling

    sampling = Sampling(
        greedy=flags.greedy,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
    )
    return continue_text(
        flags.run,
        flags.prompt,
        flags.checkpoint,
        flags.max_new_tokens,
        sampling,
        as_json=flags.json,
        data=flags.data,
    )
