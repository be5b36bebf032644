"""`opt-train export` and `opt-train import`: weights to others and from others. Neither changes
what it reads."""

import argparse
import json
import re
from pathlib import Path

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


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="a new folder, or an empty one"
    )
    parser.add_argument(
        "--checkpoint",
        default="",
        metavar="STEP",
        help="a step or a path; by default the newest good one",
    )
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


def add_import_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="a new folder, or an empty one"
    )
    parser.add_argument(
        "--from",
        default="",
        dest="kind",
        metavar="KIND",
        help="huggingface or metaseq; by default what is there",
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="opt-125m and so on, for a file that does not tell its heads",
    )


def export_weights(flags: argparse.Namespace) -> int:
    """Write a checkpoint as a Hugging Face folder."""
    from opt_train.cli.progress import report_count
    from opt_train.exchange.exporting import export
    from opt_train.run.checkpoint_choice import CheckpointChoice

    if flags.dtype not in ("", "fp32", "bf16", "fp16"):
        raise BadInput(f"--dtype={flags.dtype} is not possible; use fp32, bf16 or fp16")
    subject = CheckpointChoice(flags.run, flags.checkpoint)
    tokenizer, lacking = [], "none came with the weights"
    try:
        tokenizer = subject.tokenizer_files()
    except BadInput as error:
        lacking = str(error)
    done = export(
        subject.config.model,
        subject.folder,
        subject.checkpoint.manifest_sha256,
        flags.to,
        dtype=flags.dtype,
        shard_bytes=_bytes_of(flags.max_shard_size),
        tokenizer=tokenizer,
        verifying=report_count("verifying the checkpoint", "bytes"),
        writing=report_count("writing", "bytes"),
    )
    if flags.json:
        payload = {
            "name": subject.name,
            "checkpoint": subject.checkpoint.path,
            "step": subject.checkpoint.step,
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
        f"{flags.to}: {subject.name} at step {subject.checkpoint.step}, "
        f"{done.parameters:,} parameters in {done.dtype}, {files}"
    )
    if not done.tokenizer:
        print(f"without its tokenizer: {lacking}")
    return DONE


def import_weights(flags: argparse.Namespace) -> int:
    """Write somebody's weights as a checkpoint."""
    from opt_train.cli.progress import report_count
    from opt_train.config.compose import compose
    from opt_train.exchange.importing import bring_in
    from opt_train.exchange.sources import open_source

    if flags.kind not in ("", "huggingface", "metaseq"):
        raise BadInput(f"--from={flags.kind} is not possible; use huggingface or metaseq")
    preset = None
    if flags.model:
        if not re.fullmatch(r"[\w.-]+", flags.model):
            raise BadInput(f"--model={flags.model} is no model's name; use one as opt-125m")
        preset = compose([f"model={flags.model}", "data.corpus=stdlib"]).model
    source = open_source(flags.run, flags.kind, preset)
    done = bring_in(source, flags.to, report_count("writing", "bytes"))
    if flags.json:
        payload = {
            "name": done.model.name,
            "to": str(flags.to),
            "kind": source.kind,
            "dtype": done.dtype,
            "parameters": done.parameters,
            "bytes": done.bytes,
            "tokenizer": done.tokenizer,
            "manifest_sha256": done.manifest_sha256,
        }
        print(json.dumps(payload, indent=2))
        return DONE
    print(
        f"{flags.to}: {done.model.name} from {source.kind}, {done.parameters:,} parameters in "
        f"{done.dtype}"
    )
    if not done.tokenizer:
        print("no tokenizer was with it; `generate` and `evaluate` need prepared data with --data")
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
