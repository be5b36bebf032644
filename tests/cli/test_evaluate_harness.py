"""EleutherAI's harness on an export, and through `opt-train evaluate --harness`: the same numbers,
and the right ones.

Public data sets cannot be had here. Tasks of our own stand beside the harness's, with data of our
own.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from transformers import OPTConfig, OPTForCausalLM

from opt_train.cli import main as cli
from opt_train.cli.models import evaluate_harness
from opt_train.data.tokenizer import EOS, PAD, load
from opt_train.evaluate import harness
from tests.command import SMALL, say_apart

LENGTH = 32
"""Positions of the model: some texts are longer."""

LONG = (
    "return the queue of the heap and wait until it is empty, then import the next one from there "
    * 3
)

# The harness puts a space between the two, and divides by the choice's length without it.
CHOICES = [
    {"question": "import", "choices": ["os", "the whole queue module", "x"], "answer": 0},
    {"question": "def f(", "choices": ["self):", "a, b, c"], "answer": 1},
    {"question": f"{LONG} return", "choices": ["None", "self.queue"], "answer": 0},
    {"question": "", "choices": ["class", "if the list"], "answer": 1},
    {"question": "x = ", "choices": ["[]", "heappop(heap)", "1"], "answer": 1},
]
WORDS = [
    "import the heap queue",
    "return self",
    f"{LONG}for x in range",
    "if the queue is empty",
    "0 0 0 0 0 0 0",
]
PAGES = ["import os\n", LONG, "The end. é☃"]


def write_tasks(folder: Path) -> Path:
    """Three tasks of our own, one of each kind that scores without generating, with their data."""
    folder.mkdir()
    documents = {
        "choice": CHOICES,
        "word": [{"text": text} for text in WORDS],
        "page": [{"text": text} for text in PAGES],
    }
    keys: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "word": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity"},
                {"metric": "acc"},
            ],
        },
        "page": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for kind, rows in documents.items():
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": f"mine_{kind}",
            "dataset_path": "json",
            "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "metadata": {"version": 3},
            **keys[kind],
        }
        # JSON is YAML.
        (folder / f"{kind}.yaml").write_text(json.dumps(task))
    return folder


def split(text: str) -> tuple[str, str]:
    """All but the last word, and the last with its space."""
    context, space, word = text.rpartition(" ")
    return context, space + word


class ByHand:
    """What the numbers must be, from transformers' model and the tokenizer alone."""

    def __init__(self, exported: Path, length: int = LENGTH) -> None:
        self.length = length
        self.model = OPTForCausalLM.from_pretrained(exported).eval()
        self.words: Tokenizer = load(exported / "tokenizer.json")

    def ids(self, text: str) -> list[int]:
        return list(self.words.encode(text).ids)

    @torch.no_grad()
    def score(self, ids: list[int], count: int) -> tuple[float, bool]:
        """Log-likelihood of the last `count` ids behind as many others as there is room for; are
        they the likeliest?"""
        read = torch.tensor([ids[:-1][-self.length :]])
        logits = self.model(read).logits[0, -count:].double().log_softmax(dim=-1)
        wanted = torch.tensor(ids[-count:])
        return float(logits.gather(1, wanted[:, None]).sum()), bool(
            (logits.argmax(dim=-1) == wanted).all()
        )

    def continuation(self, context: str, text: str) -> tuple[float, bool]:
        """The space between the two belongs to the second."""
        stripped = context.rstrip(" ")
        whole = self.ids(context + text)
        before = len(self.ids(stripped))
        return (
            self.score(whole, len(whole) - before)
            if stripped
            else self.score([EOS, *whole], len(whole))
        )

    def page(self, text: str) -> float:
        """Each token once, in pieces of `LENGTH`, each behind what fits before it."""
        ids = [EOS, *self.ids(text)]
        starts = range(1, len(ids), LENGTH)
        return sum(self.score(ids[: s + LENGTH], min(LENGTH, len(ids) - s))[0] for s in starts)

    def numbers(self) -> dict[tuple[str, str], float]:
        likelihoods = [
            [self.continuation(d["question"], " " + text)[0] for text in d["choices"]]
            for d in CHOICES
        ]
        best = [max(range(len(row)), key=row.__getitem__) for row in likelihoods]
        each = [
            [value / len(text) for value, text in zip(row, d["choices"], strict=True)]
            for row, d in zip(likelihoods, CHOICES, strict=True)
        ]
        normed = [max(range(len(row)), key=row.__getitem__) for row in each]
        answers = [document["answer"] for document in CHOICES]
        words = [self.continuation(*split(text)) for text in WORDS]
        nats = -sum(self.page(text) for text in PAGES) / sum(len(text.encode()) for text in PAGES)
        return {
            ("mine_choice", "acc"): sum(a == b for a, b in zip(best, answers, strict=True))
            / len(answers),
            ("mine_choice", "acc_norm"): sum(a == b for a, b in zip(normed, answers, strict=True))
            / len(answers),
            ("mine_page", "bits_per_byte"): nats / math.log(2),
            ("mine_page", "byte_perplexity"): math.exp(nats),
            ("mine_word", "acc"): sum(likeliest for _, likeliest in words) / len(words),
            ("mine_word", "perplexity"): math.exp(-sum(value for value, _ in words) / len(words)),
        }


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Where `datasets` keeps what it reads: not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def place(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights that nobody trained, imported as `weights` and exported as `hf`, and
    `tasks`."""
    folder = tmp_path_factory.mktemp("harness") / "workplace"
    shutil.copytree(prepared_once, folder)
    write_tasks(folder / "tasks")
    torch.manual_seed(5)
    config = OPTConfig(
        vocab_size=400,
        hidden_size=64,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=160,
        max_position_embeddings=LENGTH,
        init_std=0.2,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    OPTForCausalLM(config).save_pretrained(folder / "drawn")
    shutil.copy(folder / "prepared" / "files-bpe" / "tokenizer.json", folder / "drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["import", "drawn", "--to", "weights"]) == 0
        assert cli.main(["export", "weights", "--to", "hf"]) == 0
    return folder


@pytest.fixture
def beside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def by_hand(place: Path) -> ByHand:
    return ByHand(place / "hf")


def numbers_of(results: dict[str, dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Those that the harness's own JSON has."""
    return {
        (task, key.removesuffix(",none")): value
        for task, result in results.items()
        for key, value in result.items()
        if key.endswith(",none") and "_stderr" not in key
    }


def test_the_harness_scores_an_export_as_transformers_does(beside: Path, by_hand: ByHand) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    answer = simple_evaluate(
        model="hf",
        model_args=f"pretrained={beside / 'hf'}",
        device="cpu",
        batch_size=2,
        tasks=[str(path) for path in sorted(beside.glob("tasks/*.yaml"))],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert answer is not None
    choices = sorted(answer["samples"]["mine_choice"], key=lambda sample: sample["doc_id"])
    for sample, document in zip(choices, CHOICES, strict=True):
        for [(value, likeliest)], text in zip(sample["resps"], document["choices"], strict=True):
            ours = by_hand.continuation(str(document["question"]), " " + text)
            assert (value, likeliest) == (pytest.approx(ours[0], abs=1e-4), ours[1]), (
                document,
                text,
            )
    for name, expected in (
        ("mine_word", [by_hand.continuation(*split(text))[0] for text in WORDS]),
        ("mine_page", [by_hand.page(text) for text in PAGES]),
    ):
        samples = sorted(answer["samples"][name], key=lambda sample: sample["doc_id"])
        got = [sample["resps"][0][0] for sample in samples]
        got = [value[0] if isinstance(value, tuple) else value for value in got]
        assert got == pytest.approx(expected, abs=1e-3)
    assert numbers_of(answer["results"]) == pytest.approx(by_hand.numbers(), rel=1e-5)


def test_the_verb_says_the_numbers_that_are_right(beside: Path, by_hand: ByHand, say) -> None:
    before = {path: path.read_bytes() for path in Path("weights").rglob("*") if path.is_file()}
    words = ("evaluate", "weights", "--harness", "--tasks", "tasks")
    said = say(*words, "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert (told["name"], told["step"], told["published"], told["limit"]) == (
        "drawn",
        0,
        None,
        None,
    )
    assert {(row["task"], row["metric"]): row["value"] for row in told["results"]} == pytest.approx(
        by_hand.numbers(), rel=1e-5
    )
    assert {(row["shots"], row["version"]) for row in told["results"]} == {(0, "3")}
    assert {row["documents"] for row in told["results"]} == {3, 5}
    stderr = {(row["task"], row["metric"]): row["stderr"] for row in told["results"]}
    share = by_hand.numbers()["mine_choice", "acc"]
    assert stderr["mine_choice", "acc"] == pytest.approx(math.sqrt(share * (1 - share) / 4))
    assert stderr["mine_word", "perplexity"] > 0
    assert {
        path: path.read_bytes() for path in Path("weights").rglob("*") if path.is_file()
    } == before

    said = say(*words)
    assert "Running loglikelihood requests" in said.err
    first, head, *rows, last = said.out.splitlines()
    assert first.startswith("drawn at step 0, by lm_eval 0.")
    assert head.split() == ["task", "metric", "shots", "value", "stderr", "published", "difference"]
    for row, number in zip(rows, told["results"], strict=True):
        digits = 2 if "perplexity" in number["metric"] else 4
        texts = [number["task"], number["metric"], "0", f"{number['value']:.{digits}f}"]
        assert row.split()[:4] == texts
    assert (
        last
        == "drawn has the shape of no OPT size with published values, so there is none beside it"
    )


def test_a_run_is_asked_as_it_computes_and_a_limit_passes_through(workplace: Path, say) -> None:
    """In bf16, from fp32 weights; of sequences shorter than the model could read."""
    tasks = write_tasks(workplace / "tasks")
    shape = (
        "precision=bf16",
        "data.sequence_length=24",
        "data.validation_fraction=0.2",
        "train.steps=4",
    )
    assert say("train", *SMALL, *shape).code == 0
    said = say(
        "evaluate",
        "name=small",
        "--harness",
        "--tasks",
        str(tasks / "word.yaml"),
        "--limit",
        "3",
        "--json",
    )
    assert said.code == 0, said.err
    told = json.loads(said.out)
    [perplexity, _] = told["results"]
    assert (told["name"], told["step"], told["limit"], perplexity["documents"]) == (
        "small",
        4,
        3,
        3,
    )
    assert say("export", "name=small", "--to", "hf", "--dtype", "bf16").code == 0
    by_hand = ByHand(workplace / "hf", length=24)
    assert by_hand.model.dtype == torch.bfloat16
    words = [by_hand.continuation(*split(text))[0] for text in WORDS[:3]]
    assert perplexity["value"] == pytest.approx(math.exp(-sum(words) / 3), rel=1e-3)


def public(path: str, **_: object) -> datasets.DatasetDict:
    """A few documents in the form of public data sets."""
    words = {"test": [{"text": text} for text in WORDS]}
    question = {"support": " A queue.", "question": "What is it?", "correct_answer": "a queue"}
    wrong = {
        f"distractor{n}": text for n, text in enumerate(("a heap", "a stack", "a tree"), start=1)
    }
    science = {split: [question | wrong] * 4 for split in ("train", "validation", "test")}
    known = {"EleutherAI/lambada_openai": words, "allenai/sciq": science}
    if path not in known:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (LocalEntryNotFoundError)")
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows) for split, rows in known[path].items()}
    )


@pytest.fixture
def as_if_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public data sets are there, in small, and the small model passes for OPT-125M."""
    monkeypatch.setattr("datasets.load_dataset", public)
    monkeypatch.setattr(evaluate_harness, "size_of", lambda model: "opt-125m")


def test_published_values_stand_beside_the_same_tasks(
    beside: Path, as_if_published: None, say
) -> None:
    words = ("evaluate", "weights", "--harness=sciq,lambada_openai")
    told = json.loads(say(*words, "--json").out)
    assert told["published"]["size"] == "opt-125m"
    assert "results/opt" in told["published"]["source"]
    beside_them = {(row["task"], row["metric"]): row["published"] for row in told["results"]}
    assert beside_them == {
        ("sciq", "acc"): 0.751,
        ("sciq", "acc_norm"): None,
        ("lambada_openai", "perplexity"): 26.02,
        ("lambada_openai", "acc"): 0.379,
    }
    for row in told["results"]:
        if row["published"] is not None:
            assert row["difference"] == row["value"] - row["published"]
    said = say(*words, "--limit", "3").out.splitlines()
    table = {tuple(line.split()[:2]): line.split()[2:] for line in said[2:6]}
    assert table["sciq", "acc"][-2] == "0.7510"
    assert table["lambada_openai", "perplexity"][-2] == "26.02"
    assert len(table["sciq", "acc_norm"]) == 3
    assert said[6:] == [
        "only the first 3 documents of each task; published values are of all",
        "published: opt-125m in EleutherAI/lm-evaluation-harness, results/opt; no shots, "
        "accuracies not normalised by "
        "length, version 0 of each task",
        "here: sciq version 1.0, lambada_openai version 1.0",
    ]


def test_a_task_of_the_same_name_is_not_compared(
    beside: Path, as_if_published: None, tmp_path: Path, say
) -> None:
    """Whatever somebody calls sciq, other shots or other documents are another task."""
    task = json.loads((beside / "tasks" / "choice.yaml").read_text()) | {"task": "sciq"}
    task["dataset_path"] = "allenai/sciq"
    task |= {
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{[distractor1, correct_answer]}}",
        "doc_to_target": "1",
    }
    (tmp_path / "sciq.yaml").write_text(json.dumps(task))
    for flags in ((), ("--harness=sciq",)):
        said = say("evaluate", "weights", *(flags or ("--harness",)), "--tasks", str(tmp_path))
        assert said.code == 0, said.err
        assert said.out.splitlines()[-1] == "nothing is published here for opt-125m on these tasks"


def test_data_that_cannot_be_had_are_one_sentence(beside: Path, as_if_published: None, say) -> None:
    said = say("evaluate", "weights", "--harness")
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[-1] == (
        "opt-train: the data set of task piqa cannot be had here (Couldn't reach 'baber/piqa' on "
        "the Hub "
        "(LocalEntryNotFoundError)); let this run once where huggingface.co answers and bring its "
        "HF_HOME along, "
        "or name tasks that have their data with --tasks"
    )


def test_without_a_network_it_is_one_sentence_too(beside: Path, tmp_path: Path) -> None:
    """As `datasets` itself fails, and with nothing around the sentence but what is being done."""
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    said = say_apart(beside, "evaluate", "weights", "--harness=sciq", environment=offline)
    assert (said.code, said.out) == (2, "")
    first, sentence = said.err.splitlines()
    assert first == "sciq: getting its data"
    assert sentence.startswith("opt-train: the data set of task sciq cannot be had here (")


def test_without_the_extra_it_says_what_to_install(
    beside: Path, monkeypatch: pytest.MonkeyPatch, say
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", missing)
    said = say("evaluate", "weights", "--harness")
    expected = "opt-train: --harness needs lm_eval; install it: pip install 'opt-train[harness]'\n"
    assert (said.code, said.out, said.err) == (2, "", expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--limit", "3"), "--limit is for --harness alone; add --harness, or leave it out"),
        (("--tasks", "tasks"), "--tasks is for --harness alone; add --harness, or leave it out"),
        (("--harness", "--limit", "0"), "--limit=0 must be larger than 0"),
        (
            ("--harness", "--set", "validation"),
            "--set=validation is for perplexity, and --harness measures tasks; leave one of them "
            "out",
        ),
        (
            ("--harness=hf",),
            "argument --harness: hf names no tasks; put RUN before --harness, and tasks behind it "
            "as a,b; "
            "see `opt-train evaluate --help`",
        ),
        (
            ("--harness", "--tasks", "nowhere"),
            "--tasks=nowhere is neither a file nor a folder; name a task's YAML, or a folder of "
            "them",
        ),
        (
            ("--harness", "--tasks", "corpus"),
            "--tasks=corpus holds no task; put a YAML there that has a key task",
        ),
        (
            ("--harness", "--tasks", "bad.yaml"),
            "--tasks=bad.yaml cannot be read as a task (while parsing a flow sequence); mend it",
        ),
        (
            ("--harness", "--tasks", "none.yaml"),
            "--tasks=none.yaml holds no task; give it a key task with the task's name",
        ),
        (
            ("--harness", "--tasks", "gone.yaml"),
            "the data set of task mine_word cannot be had here (Unable to find '/nowhere.jsonl'); "
            "mend dataset_path or dataset_kwargs in its YAML",
        ),
        (
            ("--harness", "--tasks", "field.yaml"),
            "task mine_word cannot be loaded (UndefinedError: 'nothing' is undefined); mend its "
            "YAML",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    flags: tuple[str, ...], expected: str, beside: Path, say
) -> None:
    task = (beside / "tasks" / "word.yaml").read_text()
    Path("bad.yaml").write_text("task: [a")
    Path("none.yaml").write_text("doc_to_text: a")
    Path("gone.yaml").write_text(
        task.replace(str(beside / "tasks" / "word.jsonl"), "/nowhere.jsonl")
    )
    Path("field.yaml").write_text(task.replace("text.split", "nothing.split"))
    said = say("evaluate", "weights", *flags)
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[-1] == f"opt-train: {expected}"
    assert "Traceback" not in said.err


@pytest.mark.whole  # the command reads the harness's list of 14,000 tasks
def test_the_harness_own_command_says_the_same(
    beside: Path, by_hand: ByHand, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            Path(sys.executable).with_name("lm_eval"),
            "run",
            "--model",
            "hf",
            "--model_args",
            f"pretrained=hf,add_bos_token=False,max_length={LENGTH}",
            "--tasks",
            "mine_choice,mine_word,mine_page",
            "--include_path",
            "tasks",
            "--device",
            "cpu",
            "--output_path",
            tmp_path / "out",
        ],
        env={
            **os.environ,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "1",
            "DISABLE_MULTIPROC": "1",
        },
        cwd=beside,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [answer] = (tmp_path / "out").rglob("results_*.json")
    assert numbers_of(json.loads(answer.read_text())["results"]) == pytest.approx(
        by_hand.numbers(), rel=1e-5
    )
