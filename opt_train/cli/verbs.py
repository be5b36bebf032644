"""The verbs of `opt-train`, in the order of `opt-train --help`: one table, one module a verb.

A verb's module is imported when it is needed and not before: `--help` answers at once, and `run`,
which stays for months, never loads torch.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

RUN = ("RUN", "run directory, such as runs/demo, or name=demo")
RUN_OR_FOLDER = ("RUN", f"{RUN[1]}, or a checkpoint's folder")


@dataclass(frozen=True, slots=True)
class Verb:
    """One word after `opt-train`."""

    summary: str
    examples: tuple[str, ...]
    module: str
    """Of `opt_train.cli`. Its `run` takes a `Job` where the verb `composes`, else the flags, and
    returns the exit code."""
    configured: bool = False
    """Takes Hydra overrides; otherwise the path of a run directory."""
    composes: bool = False
    """Its configuration is composed before its module is loaded, and each job of a multirun is a
    process."""
    has_flags: bool = False
    """Its module has `add_flags(parser)`, for those that no other verb has; without them `--help`
    need not load it."""
    has_json: bool = True
    """A verb that is not configured has something to say to a program."""
    about: tuple[str, str] = RUN
    """What a verb that is not configured takes: its name and meaning."""

    def load(self) -> ModuleType:
        return import_module(f"opt_train.cli.{self.module}")


VERBS = {
    "prepare": Verb(
        "make token shards of a corpus, once",
        (
            "opt-train prepare experiment=demo",
            "opt-train prepare data=files data.corpus=texts data.name=texts",
        ),
        "prepare",
        configured=True,
        composes=True,
    ),
    "run": Verb(
        "train under a supervisor, on a cluster or on this machine; the same command resumes",
        (
            "opt-train run experiment=demo",
            "opt-train run experiment=demo --cfg job",
            "opt-train run experiment=demo name=again ledger=runs/demo",
            "opt-train run --multirun experiment=demo optim.lr=1e-3,3e-3",
        ),
        "run",
        configured=True,
        composes=True,
    ),
    "submit": Verb(
        "write the batch script of a run's supervisor and give it to Slurm",
        (
            "opt-train submit experiment=demo",
            "opt-train submit experiment=opt-1.3b cluster.slurm.partition=a100 --dry-run",
        ),
        "submit",
        configured=True,
        has_flags=True,
    ),
    "train": Verb(
        "train without a supervisor: alone, or as torchrun starts it",
        (
            "opt-train train experiment=demo cluster.nodes=1 name=alone",
            "torchrun --standalone --nproc-per-node=2 -m opt_train.cli.main train experiment=demo "
            "name=two",
        ),
        "train",
        configured=True,
        composes=True,
    ),
    "plan": Verb(
        "say what a run needs, before it starts: memory, communication, padding, time, disk",
        (
            "opt-train plan experiment=opt-175b",
            "opt-train plan experiment=opt-175b cluster.nodes=123 --allow-idle --json",
            "opt-train plan experiment=opt-1.3b --gpu H100 --mfu 0.42 --rehearse",
            "opt-train plan --multirun 'experiment=glob(opt-*)'",
        ),
        "plan",
        configured=True,
        has_flags=True,
    ),
    "preflight": Verb(
        "test every node, alone and in pairs, before a run relies on it",
        (
            "opt-train preflight experiment=demo",
            "opt-train preflight cluster=slurm experiment=opt-175b --json",
            "opt-train preflight --site cluster=slurm",
        ),
        "preflight",
        configured=True,
        has_flags=True,
    ),
    "status": Verb(
        "say where a run is, what it does, what it waits for and what comes next",
        ("opt-train status runs/demo", "opt-train status name=demo --json"),
        "status",
    ),
    "stop": Verb(
        "ask a run to save and stop; `run` goes on with it",
        ("opt-train stop runs/demo",),
        "requests.stop",
        has_json=False,
    ),
    "intervene": Verb(
        "change learning rate, clipping, scales or data of a run while it trains",
        (
            'opt-train intervene runs/demo lr_scale=0.5 --why "the gradient norm climbs"',
            'opt-train intervene name=demo clip=0.3 skip_batches=40 --why "a bad file"',
        ),
        "requests.intervene",
        has_flags=True,
        has_json=False,
    ),
    "hold": Verb(
        "have a run save and stop, and let nothing start it again until it is resumed",
        (
            "opt-train hold runs/demo",
            'opt-train hold name=demo --reason "the loss is looked into"',
        ),
        "requests.hold",
        has_flags=True,
        has_json=False,
    ),
    "resume": Verb(
        "take a hold back, and go on where a scheduler can be asked to",
        ("opt-train resume runs/demo",),
        "requests.resume",
        has_json=False,
    ),
    "drill": Verb(
        "kill a node of a running run on purpose, and report what the supervisor does",
        (
            "opt-train drill runs/demo --dry-run",
            "opt-train drill runs/demo --node node-2 --seconds 120",
        ),
        "drill",
        has_flags=True,
    ),
    "tickets": Verb(
        "say what an admin should know of each node that a run has taken out",
        ("opt-train tickets runs/demo",),
        "tickets",
    ),
    "checkpoints": Verb(
        "list a run's checkpoints: what each is worth, and which one a restart would take",
        ("opt-train checkpoints runs/demo", "opt-train checkpoints runs/demo --verify --json"),
        "checkpoints",
        has_flags=True,
    ),
    "ledger": Verb(
        "list the changes that a run trains under, each with the step behind which it holds",
        ("opt-train ledger runs/demo", "opt-train ledger name=demo --json"),
        "steps.ledger",
    ),
    "batch": Verb(
        "list the documents of the batch that a step was trained on",
        (
            "opt-train batch runs/demo --step 120",
            "opt-train batch name=demo --step 120 --attempt 1.00 --json",
        ),
        "steps.batch",
        has_flags=True,
    ),
    "evaluate": Verb(
        "measure a checkpoint's perplexity on the validation sets, or its scores on public tasks",
        (
            "opt-train evaluate runs/demo",
            "opt-train evaluate name=demo --checkpoint 120 --set validation --json",
            "opt-train evaluate runs/demo --harness",
            "opt-train evaluate runs/demo --harness=piqa,sciq --limit 100",
            "opt-train evaluate runs/demo --harness --tasks mine.yaml",
        ),
        "evaluate",
        has_flags=True,
        about=RUN_OR_FOLDER,
    ),
    "generate": Verb(
        "let a checkpoint go on with a text",
        (
            'opt-train generate runs/demo "import os" --greedy',
            'opt-train generate runs/demo "def " --max-new-tokens 100 --temperature 0.8 --top-p '
            "0.9 --seed 1",
        ),
        "generate",
        has_flags=True,
        about=RUN_OR_FOLDER,
    ),
    "export": Verb(
        "write a checkpoint's weights as a Hugging Face folder",
        (
            "opt-train export runs/demo --to demo-hf",
            "opt-train export name=demo --checkpoint 120 --to demo-hf --dtype fp16 "
            "--max-shard-size 2GB",
        ),
        "export_weights",
        has_flags=True,
        about=RUN_OR_FOLDER,
    ),
    "import": Verb(
        "make a checkpoint of Hugging Face's or metaseq's OPT weights",
        (
            "opt-train import opt-125m-hf --to opt-125m",
            "opt-train import consolidated.pt --from metaseq --model opt-125m --to opt-125m",
        ),
        "import_weights",
        has_flags=True,
        about=("SOURCE", "a Hugging Face folder, or metaseq's consolidated file"),
    ),
}
