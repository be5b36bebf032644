"""The tokenizer: OPT's ids, every text comes back, and text never becomes a special entry."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from opt_train.data import tokenizer as bpe
from opt_train.data.config import TokenizerConfig
from opt_train.protocol.exits import BadInput

TEXTS = [
    "the cat sat on the mat",
    "the hat of the cat",
    "def f(x):\n    return x\n",
    "\u00e4\u00f6\u00fc \U0001f600",
] * 9

GPT2 = Path(__file__).parents[3] / "shared" / "data"
needs_gpt2 = pytest.mark.skipif(
    not (GPT2 / "gpt2-vocab.json").exists(),
    reason="metaseq's gpt2-vocab.json and gpt2-merges.txt are not in ../shared/data",
)


def gpt2() -> TokenizerConfig:
    return TokenizerConfig(
        name="gpt2",
        vocab_file=str(GPT2 / "gpt2-vocab.json"),
        merges_file=str(GPT2 / "gpt2-merges.txt"),
    )


@pytest.fixture(scope="module")
def trained():
    return bpe.train(iter(TEXTS), 300)


def test_specials_have_opt_s_ids(trained) -> None:
    assert [trained.token_to_id(special) for special in ("<s>", "<pad>", "</s>", "<unk>")] == [
        0,
        1,
        2,
        3,
    ]
    assert (bpe.PAD, bpe.EOS) == (1, 2)
    assert bpe.size_of(trained) <= 300


def test_the_same_text_gives_the_same_tokenizer(trained) -> None:
    assert bpe.train(iter(TEXTS), 300).to_str() == trained.to_str()


@given(text=st.text())
@settings(max_examples=100, deadline=None)
def test_every_text_comes_back(trained, text: str) -> None:
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("special", ["<s>", "</s>", "<pad>", "<unk>"])
def test_a_document_that_spells_a_special_does_not_become_one(
    trained, tmp_path: Path, special: str
) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(str(path))
    for tokenizer in (trained, bpe.load(path)):
        ids = tokenizer.encode(f"a{special}b").ids
        assert min(ids) > 3
        assert tokenizer.decode(ids) == f"a{special}b"


def test_a_damaged_tokenizer_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer.json is no tokenizer"):
        bpe.load(tmp_path / "tokenizer.json")
    with pytest.raises(BadInput, match=r"missing.json cannot be read"):
        bpe.load(tmp_path / "missing.json")


@needs_gpt2
def test_metaseq_s_files_give_the_released_models_ids() -> None:
    tokenizer = bpe.from_files(gpt2())
    assert bpe.size_of(tokenizer) == 50265
    # The ids that the released OPT and RoBERTa models use for these words.
    assert tokenizer.encode("Hello world").ids == [31414, 232]
    assert tokenizer.encode("Hello world</s>").ids[:2] == [31414, 232]
    assert (
        tokenizer.decode(tokenizer.encode("na\u00efve \U0001f600\n\t x").ids)
        == "na\u00efve \U0001f600\n\t x"
    )


@needs_gpt2
def test_openai_s_order_moves_up_by_four(tmp_path: Path) -> None:
    """The same merges under a vocabulary without the specials: same pieces, ids from 4."""
    released = json.loads(Path(gpt2().vocab_file).read_text())
    merges = Path(gpt2().merges_file).read_text()
    pieces = [
        piece for piece in released if piece not in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    ]
    openai = {piece: number for number, piece in enumerate(sorted(pieces))}
    (tmp_path / "vocab.json").write_text(json.dumps(openai))
    (tmp_path / "merges.txt").write_text(merges)
    config = TokenizerConfig(
        vocab_file=str(tmp_path / "vocab.json"), merges_file=str(tmp_path / "merges.txt")
    )
    tokenizer = bpe.from_files(config)
    assert bpe.size_of(tokenizer) == len(openai) + 4
    assert tokenizer.encode("Hello world").ids == [openai["Hello"] + 4, openai["\u0120world"] + 4]
    assert tokenizer.token_to_id("<|endoftext|>") == openai["<|endoftext|>"] + 4


BYTES = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}


def files(folder: Path, vocabulary: object, merges: str) -> TokenizerConfig:
    (folder / "vocab.json").write_text(
        vocabulary if isinstance(vocabulary, str) else json.dumps(vocabulary)
    )
    (folder / "merges.txt").write_text(merges)
    return TokenizerConfig(
        vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt")
    )


@pytest.mark.parametrize(
    ("vocabulary", "merges", "sentence"),
    [
        ("{", "", r"vocab.json is not readable JSON"),
        ([], "", r"vocab.json does not map entries to numbers"),
        ({"a": "b"}, "", r"vocab.json does not map entries to numbers"),
        ({"a": True}, "", r"vocab.json does not map entries to numbers"),
        (
            {"<s>": 5, "a": 0},
            "",
            r"has <s> <pad> </s> <unk> at \[5, None, None, None\] where OPT has 0 1 2 3",
        ),
        (
            BYTES,
            "#version: 0.2\na b\n",
            r"merges.txt line 2 merges what tokenizer.vocab_file does not hold",
        ),
    ],
)
def test_files_of_another_kind_are_bad_input(
    tmp_path: Path, vocabulary: object, merges: str, sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence):
        bpe.from_files(files(tmp_path, vocabulary, merges))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            TokenizerConfig(vocab_file="x"),
            "tokenizer.vocab_file is set without tokenizer.merges_file",
        ),
        (
            TokenizerConfig(merges_file="x"),
            "tokenizer.merges_file is set without tokenizer.vocab_file",
        ),
        (
            TokenizerConfig(vocab_file="/no/x", merges_file="/no/y"),
            "tokenizer.vocab_file=/no/x does not exist",
        ),
        (
            TokenizerConfig(vocab_file="v" * 300, merges_file="/no/y"),
            "v does not exist; name GPT-2's file",
        ),
        (TokenizerConfig(vocab_size=259), "tokenizer.vocab_size=259 must lie between 260"),
    ],
)
def test_impossible_keys_are_bad_input(config: TokenizerConfig, sentence: str) -> None:
    with pytest.raises(BadInput) as raised:
        bpe.check(config)
    assert sentence in str(raised.value)


def test_a_larger_vocabulary_makes_fewer_tokens() -> None:
    counts = [len(bpe.train(iter(TEXTS), size).encode(TEXTS[0]).ids) for size in (260, 270, 300)]
    assert counts[0] == len(TEXTS[0])
    assert all(more > fewer for more, fewer in pairwise(counts))


@pytest.mark.parametrize("symbol", ["a", "\u0120", "\u0100"])
@pytest.mark.parametrize("first", [0, 4])
def test_a_vocabulary_without_a_byte_is_refused_and_no_text_lost(
    tmp_path: Path, symbol: str, first: int
) -> None:
    specials = dict(zip(bpe.SPECIALS, range(4), strict=True)) if first else {}
    vocabulary = specials | {entry: first + number for entry, number in BYTES.items()}
    tokenizer = bpe.from_files(files(tmp_path, vocabulary, ""))
    assert tokenizer.decode(tokenizer.encode("a \0\u00e4").ids) == "a \0\u00e4"
    del vocabulary[symbol]
    with pytest.raises(
        BadInput, match=rf"vocab.json lacks 1 of the 256 byte symbols \({symbol}\).*; use GPT-2's"
    ):
        bpe.from_files(files(tmp_path, vocabulary, ""))


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (BYTES["a"], "gives 'a' and 'other' the same id"),
        (-1, "gives 'other' an id that is not between 0 and 4294967295"),
        (-5, "gives 'other' an id that is not between 0 and 4294967295"),
        ((1 << 32) - 4, "gives 'other' an id that is not between 0 and 4294967295"),
        (1 << 64, "gives 'other' an id that is not between 0 and 4294967295"),
    ],
)
def test_ids_that_no_shard_can_tell_apart_are_bad_input(
    tmp_path: Path, number: int, sentence: str
) -> None:
    if number == -1:  # becomes 3 when the ids move up to make room, which is that of a special
        sentence = "gives '<unk>' and 'other' the same id"
    with pytest.raises(BadInput) as raised:
        bpe.from_files(files(tmp_path, BYTES | {"other": number}, ""))
    assert sentence in str(raised.value)
