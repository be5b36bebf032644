"""`opt-train export`: a checkpoint's weights for others. It changes nothing in its run."""

import argparse
import json
import re
from pathlib import Path

from opt_train.cli.checkpoint_flag import add_checkpoint_flag
from opt_train.protocol.exits import DONE, BadInput

UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `opt-train export`."""
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="a new folder, or an empty one"
    )
    add_checkpoint_flag(parser)
    parser.add_argument(
        "--dtype",
        default="",
        metavar="TYPE",
        help="fp32, bf16 or fp16; by default that of the checkpoint's weights",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="a file is no larger, unless one tensor is; 5GB by default",
    )


def run(flags: argparse.Namespace) -> int:
    """Write a checkpoint as a Hugging Face folder."""
    from opt_train.cli.progress import report_count
    from opt_train.exchange.exporting import export
    from opt_train.run.checkpoint_choice import CheckpointChoice

    if flags.dtype not in ("", "fp32", "bf16", "fp16"):
        raise BadInput(f"--dtype={flags.dtype} is not possible; use fp32, bf16 or fp16")
    choice = CheckpointChoice(flags.run, flags.checkpoint)
    tokenizer, lacking = [], "none came with the weights"
    try:
        tokenizer = choice.tokenizer_files()
    except BadInput as error:
        lacking = str(error)
    done = export(
        choice.config.model,
        choice.folder,
        choice.checkpoint.manifest_sha256,
        flags.to,
        dtype=flags.dtype,
        shard_bytes=_bytes_of(flags.max_shard_size),
        tokenizer=tokenizer,
        verifying=report_count("verifying the checkpoint", "bytes"),
        writing=report_count("writing", "bytes"),
    )
    if flags.json:
        payload = {
            "name": choice.name,
            "checkpoint": choice.checkpoint.path,
            "step": choice.checkpoint.step,
            "to": str(flags.to),
            "dtype": done.dtype,
            "parameters": done.parameters,
            "bytes": done.bytes,
            "files": list(done.files),
            "tokenizer": done.tokenizer,
        }
        print(json.dumps(payload, indent=2))
        return DONE
    files = done.files[0] if len(done.files) == 1 else f"{len(done.files)} files"
    print(
        f"{flags.to}: {choice.name} at step {choice.checkpoint.step}, "
        f"{done.parameters:,} parameters in {done.dtype}, {files}"
    )
    if not done.tokenizer:
        print(f"without its tokenizer: {lacking}")
    return DONE


def _bytes_of(text: str) -> int:
    """`5GB` in bytes.

    Raises:
        BadInput: it is no size.
    """
    match = re.fullmatch(r"(\d{1,15})\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in UNITS or int(match[1]) < 1:
        raise BadInput(f"--max-shard-size={text} is no size; write one as 5GB or 500MB")
    return int(match[1]) * UNITS[match[2].upper()]
