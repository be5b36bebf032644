"""The flags by which a verb is given one checkpoint of a run."""

import argparse
from pathlib import Path


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        default="",
        metavar="STEP",
        help="a step or a path; by default the newest good one",
    )


def add_data_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="prepared data, for imported weights alone"
    )
