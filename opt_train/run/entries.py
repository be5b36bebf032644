"""Journal entries that more than one writer makes, built from what they say."""

from opt_logbook.record.events import RunCreated

from opt_train.config.run_config import RunConfig
from opt_train.data.manifest import DatasetManifest
from opt_train.model.sizes import parameter_count


def run_created(config: RunConfig, manifest: DatasetManifest) -> RunCreated:
    """The first line of the run's journal."""
    return RunCreated(
        name=config.name,
        seed=config.seed,
        model=config.model.name,
        parameters=parameter_count(config.model),
        steps=config.train.steps,
        tokens_per_step=config.train.global_batch * config.data.sequence_length,
        tokenizer=manifest.tokenizer,
        data=manifest.name,
        data_fingerprint=manifest.fingerprint,
        train_tokens=manifest.train_tokens,
        validation_tokens=manifest.validation_tokens,
        unigram_perplexity=manifest.unigram_perplexity,
        learning_rate=config.optim.lr,
    )
