"""`opt-train import`: a checkpoint of weights from others, which are only read."""

import argparse
import json
import re
from pathlib import Path

from opt_train.protocol.exits import DONE, BadInput


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `opt-train import`."""
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


def run(flags: argparse.Namespace) -> int:
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
