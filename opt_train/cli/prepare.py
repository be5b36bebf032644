"""`opt-train prepare`: token shards of a corpus, once for all runs with the same data."""

from opt_train.cli.jobs import Job
from opt_train.data.manifest import check_fits
from opt_train.data.prepare import prepare
from opt_train.data.prepared import directory_of
from opt_train.data.verify import verify_dataset
from opt_train.protocol.exits import DONE


def run(job: Job) -> int:
    """Prepare the data of the job's configuration; what is there already is verified.

    Raises:
        BadInput: corpus or tokenizer cannot be used, or the data does not fit the model.
    """
    config = job.config
    directory = directory_of(config.data, config.tokenizer)
    manifest = prepare(config.data, config.tokenizer, lambda line: print(line, flush=True))
    check_fits(
        manifest, vocab_size=config.model.vocab_size, sequence_length=config.data.sequence_length
    )
    verify_dataset(directory)
    sets = "".join(f", {named.tokens:,} of the set {named.name}" for named in manifest.sets)
    print(
        f"{directory}: {manifest.train_tokens:,} training and "
        f"{manifest.validation_tokens:,} validation tokens{sets}, vocabulary "
        f"{manifest.vocab_size:,}"
    )
    return DONE
