"""Which checkpoint a verb is about: a run's newest, one by its step or path, or imported weights
without a run."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from opt_logbook.record.run_directory import RunDirectory

from opt_train.checkpoint import manifest
from opt_train.checkpoint.manifest import MANIFEST, CheckpointError
from opt_train.config.run_config import RunConfig, from_json
from opt_train.data import tokenizer
from opt_train.data.manifest import TOKENIZER_FILE, DatasetManifest
from opt_train.exchange import tokenizer_files
from opt_train.exchange.imported import is_imported, model_of
from opt_train.protocol.exits import BadInput
from opt_train.run.admission import check_same_data
from opt_train.run.checkpoint import Checkpoint
from opt_train.run.report.run_report import RunReport

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class CheckpointChoice:
    """A checkpoint that is to be evaluated or exported."""

    def __init__(self, path: Path, wanted: str = "", data: Path | None = None) -> None:
        """Find it.

        Args:
            path: a run directory, or a checkpoint's folder.
            wanted: a step, or a path as `opt-train checkpoints` prints it; empty: the newest good
                one.
            data: prepared data, for imported weights alone; None: what their tokenizer is taken
                from.

        Raises:
            BadInput: there is no such run or checkpoint, or the run's configuration cannot be read.
        """
        if (path / MANIFEST).is_file():
            if wanted:
                raise BadInput(f"{path} is a checkpoint itself; leave --checkpoint={wanted} out")
            path = path.absolute()
            if self._is_imported(path, data):
                return
            path, wanted = self._place_in_run(path)
        if data is not None:
            raise BadInput(f"{path} has its own data; --data is for imported weights")
        self.run: RunDirectory | None = RunDirectory(path)
        report = RunReport(self.run)
        self.name = report.created.name
        self.config = self._read_configuration(self.run)
        self.checkpoint = self._choose(self.run, report, wanted)
        self.folder = self.run.path / self.checkpoint.path
        self.data: Path | None = Path(self.config.data.directory)

    def _is_imported(self, folder: Path, data: Path | None) -> bool:
        content = (folder / MANIFEST).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        try:
            committed = manifest.read(folder, sha256)
        except CheckpointError as error:
            raise BadInput(
                f"{error}; give another checkpoint, or import the weights again"
            ) from None
        if not is_imported(committed):
            return False
        model, weights = model_of(folder, committed)
        self.run = None
        self.name = model.name
        config = RunConfig()
        self.config = replace(
            config,
            model=model,
            precision=replace(config.precision, weights=weights, compute=weights),
            data=replace(config.data, sequence_length=model.positions),
        )
        self.checkpoint = Checkpoint(str(folder), committed.attempt, committed.step, sha256)
        self.folder = folder
        self.data = data
        return True

    @staticmethod
    def _place_in_run(folder: Path) -> tuple[Path, str]:
        """The run directory that a checkpoint's folder lies in, and the folder's path there."""
        # As written first: what a link in the run directory leads to may lie elsewhere.
        for path in (Path(os.path.abspath(folder)), folder.resolve()):
            if len(path.parents) > 2 and RunDirectory(path.parents[2]).journal.exists():
                return path.parents[2], str(path)
        raise BadInput(
            f"{folder} is a run's checkpoint outside its run directory, which alone tells the "
            "model; "
            "give the run directory, with --checkpoint"
        )

    @staticmethod
    def _read_configuration(run: RunDirectory) -> RunConfig:
        try:
            return from_json(run.config_json)
        except (OSError, ValueError, BadInput) as error:
            raise BadInput(
                f"{run.config_json} cannot be read ({error}); restore it from a copy"
            ) from None

    @staticmethod
    def _choose(run: RunDirectory, report: RunReport, wanted: str) -> Checkpoint:
        if not wanted:
            newest = report.state.newest_good(shared_only=True)
            if newest is None:
                raise BadInput(
                    f"{run.path} has no good checkpoint yet; wait until it has saved one"
                )
            return newest
        by_step = [one for one in report.state.chain() if str(one.step) == wanted]
        by_path = [
            one
            for one in report.state.checkpoints
            if Path(wanted) in (Path(one.path), run.path / one.path)
        ]
        for one in (*by_step, *by_path):
            return one
        raise BadInput(
            f"--checkpoint={wanted} is not in {run.path}; `opt-train checkpoints {run.path}` "
            "lists them"
        )

    def dataset(self) -> tuple[Path, DatasetManifest]:
        """The prepared data's folder and manifest.

        Raises:
            BadInput: it is not there, or another than the run was trained on.
        """
        if self.data is None:
            raise BadInput(
                f"{self.folder} belongs to no run, and so has no data; name prepared data with "
                "--data"
            )
        dataset = DatasetManifest.read(self.data)
        if self.run is not None:
            check_same_data(self.run, dataset)
        else:
            self._check_same_words(self.data)
        return self.data, dataset

    def _check_same_words(self, data: Path) -> None:
        """Perplexity on the tokens of another tokenizer would be a number without a meaning."""
        if not tokenizer_files.tokenizer_files(self.folder / tokenizer_files.FOLDER):
            return
        if not tokenizer_files.same_ids(
            self.folder / tokenizer_files.FOLDER, data / TOKENIZER_FILE
        ):
            raise BadInput(
                f"--data={data} was prepared with another tokenizer than came with {self.folder}"
            )

    def _own_tokenizer(self) -> "Tokenizer":
        return tokenizer_files.load(
            tokenizer_files.configuration_of(self.folder / tokenizer_files.FOLDER)
        )

    def damaged(self, error: CheckpointError) -> BadInput:
        """What to tell a person whose choice cannot be read, as `error` says."""
        if self.run is None:
            return BadInput(f"{error}; import the weights again")
        return BadInput(
            f"{error}; give another --checkpoint of `opt-train checkpoints {self.run.path}`"
        )

    def tokenizer(self) -> "Tokenizer":
        """The run's own, or the one that came with imported weights.

        Raises:
            BadInput: it is missing, another one than the data was prepared with, or another
                model's.
        """
        if self.data is None:
            loaded = self._own_tokenizer()
        else:
            data, dataset = self.dataset()
            path = data / TOKENIZER_FILE
            loaded = tokenizer.load(path)
            if hashlib.sha256(path.read_bytes()).hexdigest() != dataset.tokenizer_sha256:
                raise BadInput(
                    f"{path} has changed since the data was prepared; restore it, or prepare the "
                    "data again"
                )
        self._check_is_the_models(loaded)
        return loaded

    def _check_is_the_models(self, loaded: "Tokenizer") -> None:
        where = self.folder / tokenizer_files.FOLDER if self.data is None else self.data
        entries, rows = tokenizer.size_of(loaded), self.config.model.vocab_size
        if entries > rows:
            raise BadInput(
                f"the tokenizer in {where} has {entries} entries and the model {rows}; "
                "give the one that the model was trained with"
            )
        if (end := loaded.token_to_id(tokenizer.SPECIALS[tokenizer.EOS])) != tokenizer.EOS:
            raise BadInput(
                f"the tokenizer in {where} has </s> at {end}, where OPT has {tokenizer.EOS}; "
                "give the one that the model was trained with"
            )

    def tokenizer_files(self) -> list[Path]:
        """The files of the tokenizer, to go along with the weights.

        Raises:
            BadInput: it is not where the run's data was, or is not the one that the run was trained
                with.
        """
        if self.data is None:
            return tokenizer_files.tokenizer_files(self.folder / tokenizer_files.FOLDER)
        self.tokenizer()
        return [self.data / TOKENIZER_FILE]
