"""What prepared data must be for a configuration: where it lies, the keys that made it, its sets.

Read from its manifest alone, so without numpy: a run's start asks here."""

from pathlib import Path

from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.data.manifest import DatasetManifest, NamedSet
from opt_train.data.named_sets import named_sets
from opt_train.protocol.exits import BadInput


def directory_of(data: DataConfig, tokenizer: TokenizerConfig) -> Path:
    """Where the prepared data of this configuration lies."""
    if data.directory:
        return Path(data.directory)
    return Path("prepared") / f"{data.name}-{tokenizer.name}"


def configuration_of(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, str | int | float]:
    """The keys that decide the tokens. Names, folders, sequence length and shard size do not. Named
    sets may, by the documents they take out of training: `check_sets` sees to those."""
    keys: dict[str, str | int | float] = {
        "data.corpus": data.corpus,
        "data.max_bytes": data.max_bytes,
        "data.validation_fraction": data.validation_fraction,
    }
    # With files given, vocab_size decides nothing and must not part folders of the same tokens.
    if tokenizer.vocab_file:
        return keys | {
            "tokenizer.vocab_file": tokenizer.vocab_file,
            "tokenizer.merges_file": tokenizer.merges_file,
        }
    return keys | {"tokenizer.vocab_size": tokenizer.vocab_size}


def check_prepared_by(
    manifest: DatasetManifest, data: DataConfig, tokenizer: TokenizerConfig, directory: Path
) -> None:
    """Refuse tokens that another corpus or tokenizer made.

    Raises:
        BadInput: `directory`, whose manifest this is, was prepared by another configuration, or
            lacks a named set.
    """
    check_configuration(manifest, configuration_of(data, tokenizer), directory)
    if lacking := check_sets(manifest, data, directory):
        raise BadInput(
            f"{directory} lacks the validation set {lacking[0]}; `opt-train prepare` with the "
            "same keys adds it"
        )


def check_configuration(
    manifest: DatasetManifest, configuration: dict[str, str | int | float], directory: Path
) -> None:
    """Refuse data whose manifest names other keys than `configuration`.

    Raises:
        BadInput: they differ; the message names each with both values.
    """
    keys = sorted(manifest.configuration.keys() | configuration.keys())
    differences = [
        f"{key} was {manifest.configuration.get(key, 'not set')} and is "
        f"{configuration.get(key, 'not set')}"
        for key in keys
        if manifest.configuration.get(key) != configuration.get(key)
    ]
    if differences:
        raise BadInput(
            f"{directory} was prepared by another configuration ({'; '.join(differences)}); "
            "use another data.name or data.directory, or delete that folder"
        )


def check_sets(manifest: DatasetManifest, data: DataConfig, directory: Path) -> tuple[str, ...]:
    """Compare the sets that `directory` holds with those that `data` names; returns the names that
    it lacks.

    Raises:
        BadInput: a set was made of another corpus or is too short, or one is not named any more for
            which documents were left out of training.
    """
    wanted = named_sets(data)
    for known in manifest.sets:
        if known.name not in wanted:
            if known.left_out:
                raise BadInput(
                    f"{directory} was prepared without {counted_documents(known.left_out)} of the "
                    f"corpus that the set {known.name} holds; keep {known.name}={known.corpus} "
                    "in data.validation_sets, or use another data.name or data.directory"
                )
            continue
        if wanted[known.name] != known.corpus:
            raise BadInput(
                f"data.validation_sets: {known.name} was made of {known.corpus} in {directory} and "
                f"is {wanted[known.name]} now; give that one another name"
            )
        check_length(known, data)
    known_names = {known.name for known in manifest.sets}
    return tuple(name for name in wanted if name not in known_names)


def check_length(named: NamedSet, data: DataConfig) -> None:
    """Refuse a validation set that is shorter than one sequence.

    Raises:
        BadInput: it is.
    """
    if named.tokens < data.sequence_length + 1:
        raise BadInput(
            f"data.validation_sets: {named.name} has {named.tokens} tokens, and one sequence of "
            f"data.sequence_length={data.sequence_length} takes {data.sequence_length + 1}; add "
            f"text to {named.corpus} or leave the set out"
        )


def counted_documents(count: int) -> str:
    """`count` documents, for a sentence."""
    return f"{count:,} document{'' if count == 1 else 's'}"
