"""`opt-train train`: a rank without agent and supervisor. Here it gets a journal, a committer and a
voice of its own.

The same training code, the same run directory: a run begun alone can go on under `opt-train run`,
and the other way round. What is missing is the judgement: nobody restarts it, diagnoses it or gives
it orders.
"""

import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from opt_logbook.record.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    Entry,
    Event,
    InForceReported,
    LineageOpened,
    RunFinished,
    RunStopped,
    SaveAbandoned,
    TrainingBegan,
    ValidationMeasured,
)
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock, LockHeld
from opt_logbook.record.metrics import MetricsWriter, number_of
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.story.format import perplexity_on

from opt_train.cli.run import warn
from opt_train.clusters.make_cluster import make_cluster
from opt_train.config.checks import check
from opt_train.config.run_config import RunConfig, sha256_of
from opt_train.data.verify import verify_dataset
from opt_train.protocol.exits import (
    BAD_INPUT,
    DONE,
    NO,
    PERSON_MUST_DECIDE,
    RANK_BAD_CONFIG,
    RANK_UNSTABLE,
    STOPPED,
    BadInput,
)
from opt_train.protocol.facts import (
    ExitNotice,
    InForce,
    Metrics,
    SavedFile,
    SaveFailed,
    ShardsSaved,
    Validation,
)
from opt_train.protocol.framing import Message
from opt_train.run.admission import (
    admitted_data,
    check_room,
    check_weights_fit_data,
    check_weights_fit_model,
)
from opt_train.run.checkpoint import Checkpoint
from opt_train.run.entries import run_created
from opt_train.run.fold import fold
from opt_train.run.lineage import (
    RunStart,
    classify_start,
    git_state,
    package_versions,
    resolve,
    write_configuration,
)
from opt_train.run.report import summary
from opt_train.run.retention import dispensable
from opt_train.run.state import RunState
from opt_train.sinks.sink_processes import SinkProcesses
from opt_train.supervisor.effects import CommitManifest
from opt_train.supervisor.shell.checkpoint_keeper import CheckpointKeeper
from opt_train.supervisor.shell.start import damage_question
from opt_train.train.fact_pipe import log_line
from opt_train.train.standalone import StandaloneBegin, train_standalone

EXIT_OF = {RANK_BAD_CONFIG: BAD_INPUT, RANK_UNSTABLE: PERSON_MUST_DECIDE}
"""What a rank's own exit codes are to the person who started it."""

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a rank that is not alone finds in its environment."""


def train(config: RunConfig) -> int:
    """Train until the steps are done or a signal asks to stop; resumes from the newest good
    checkpoint.

    Raises:
        BadInput: the run cannot begin or go on like this.
    """
    config = _as_started(config)
    directory, resolved = resolve(config)
    start = classify_start(directory, resolved, asked_for_lineage=config.lineage == "new")
    leads = os.environ.get("RANK", "0") == "0"
    if start.is_finished:
        if leads:
            print(summary(directory))
        return DONE
    if start.is_new:
        check_weights_fit_model(resolved)
    alone = StandaloneRun(directory, resolved, start)
    sinks = SinkProcesses(directory, resolved.sinks, warn)

    def open_run() -> StandaloneBegin:  # on rank 0 alone
        lone = alone.open()
        sinks.start()
        return lone

    try:
        code = train_standalone(resolved, open_run, alone.reject_checkpoint, alone.tell)
    except BadInput:
        if not alone.question:
            raise
        print(f"opt-train: {alone.question}")
        return PERSON_MUST_DECIDE
    finally:
        alone.close()
        sinks.close()
    if alone.is_unsaved:
        code = NO
    if leads:
        _render(directory)
        log_line(summary(directory))
    code = EXIT_OF.get(code, code)
    if config.parallel.engine != "fsdp2":
        # Both other engines sometimes abort the interpreter as it ends, when all is done (1 exit in
        # 10, measured).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _render(directory: RunDirectory) -> None:
    """Tell the story so far; a picture that cannot be drawn must not change what the run came
    to."""
    from opt_logbook.render.render import render

    try:
        render(directory)
    except Exception as error:
        log_line(
            f"the chronicle could not be rendered ({error}); try: logbook render {directory.path}"
        )


def _as_started(config: RunConfig) -> RunConfig:
    """The configuration with the nodes and slots that torchrun gave, or a single rank."""
    world, local = _degree("WORLD_SIZE"), _degree("LOCAL_WORLD_SIZE")
    missing = [name for name in OF_TORCHRUN if name not in os.environ]
    if missing and (world > 1 or "RANK" in os.environ):
        raise BadInput(
            f"no {' and no '.join(missing)} beside "
            f"{'RANK' if 'RANK' in os.environ else 'WORLD_SIZE'} in the "
            "environment; start the ranks with torchrun, or unset it to train alone"
        )
    if world % local:
        raise BadInput(
            f"WORLD_SIZE={world} is no multiple of LOCAL_WORLD_SIZE={local}; start as many ranks "
            "on each node"
        )
    cluster = replace(config.cluster, nodes=world // local, slots_per_node=local, buffer_nodes=0)
    config = replace(config, cluster=cluster)
    check(config)
    return config


def _degree(name: str) -> int:
    text = os.environ.get(name, "1")
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(
            f"{name}={text} in the environment is no number of ranks; start the ranks with torchrun"
        )
    return int(text)


class StandaloneRun:
    """Holds the run's lock and writes its record while a lone rank trains. Used on rank 0 alone."""

    def __init__(self, directory: RunDirectory, config: RunConfig, start: RunStart) -> None:
        self._directory = directory
        self._config = config
        self._start = start
        self._lock: Lock | None = None
        self._journal: Journal | None = None
        self._keeper: CheckpointKeeper
        self._metrics = MetricsWriter(directory)
        self._state = RunState()
        self._attempt = ""
        self._removing = ThreadPoolExecutor(1, thread_name_prefix="remove")
        self._loss = math.nan
        self._tokens = 0
        self._reports: dict[int, ShardsSaved] = {}
        """Rank to what it saved of the checkpoint that is being made."""
        self._loses_metrics = False
        """The newest line could not be written, and that has been said."""
        self.question = ""
        """What a person must decide before training can begin."""
        self.is_unsaved = False
        """All steps are done, but the last checkpoint could not be committed."""

    def open(self) -> StandaloneBegin:
        """Take the lock, journal the attempt, and decide which checkpoint it begins with.

        Raises:
            BadInput: somebody else has the run, its directory cannot be used, or its checkpoints
                are all damaged.
        """
        try:
            return self._open()
        except OSError as error:
            where = error.filename or self._directory.path
            raise BadInput(f"{where}: {error.strerror or error}; mend it and start again") from None

    def _open(self) -> StandaloneBegin:
        config, start = self._config, self._start
        if start.is_new:
            check_room(self._directory, config)
        data = admitted_data(self._directory, config)
        if start.is_new:
            check_weights_fit_data(config)
            verify_dataset(Path(config.data.directory))
        self._directory.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = Lock.acquire(self._directory)
        except LockHeld as error:
            raise BadInput(str(error)) from None
        self._check_nobody_else_trains()
        self._keeper = CheckpointKeeper(self._directory, self._lock, sha256_of(config))
        write_configuration(self._directory, config, start)
        journal = self._journal = Journal.open(self._directory, self._lock)
        for entry in journal.entries:
            self._state = fold(self._state, entry)
        for repair in journal.repairs:
            self._append(repair)
        self.question = damage_question(self._directory, journal.repairs)
        if self.question:
            raise BadInput(self.question)
        if start.is_new:
            self._append(run_created(config, data))
        if start.is_new or start.opens_lineage:
            self._append(LineageOpened(start.lineage, sha256_of(config), start.lineage_difference))
        return self._begin(journal)

    def _check_nobody_else_trains(self) -> None:
        """A supervisor that died leaves agents, and ranks that train on until their lease is
        over."""
        living = make_cluster(self._config.cluster, self._directory).living_agents()
        if living:
            raise BadInput(
                f"the agents of {self._directory.path} ({', '.join(living)}) still live, "
                "without a supervisor; "
                f"go on with `opt-train run`, or wait {self._config.supervisor.orphan_seconds:g} "
                "s until they have left"
            )

    def _begin(self, journal: Journal) -> StandaloneBegin:
        state = self._state
        if state.live is not None:
            # Whoever trained it died without a word: the lock was free.
            self._append(AttemptEnded(state.live.generation, "failed"), attempt=state.live.name)
        self._keeper.clear(state.history, {saved.path for saved in state.checkpoints})
        checkpoint = self._newest_in_place()
        self._attempt = state.next_attempt(self._start.lineage)
        commit, dirty = git_state()
        started = AttemptStarted(
            generation=state.generation + 1,
            parent=checkpoint.attempt if checkpoint else "",
            checkpoint=checkpoint.path if checkpoint else "",
            manifest_sha256=checkpoint.manifest_sha256 if checkpoint else "",
            nodes=(socket.gethostname(),),
            buffer=(),
            world_size=self._config.world_size,
            reason="started alone, without a supervisor",
            config_sha256=sha256_of(self._config),
            git_commit=commit,
            git_dirty=dirty,
            packages=package_versions(),
            difference=self._start.operational_difference,
        )
        self._append(started, step=checkpoint.step if checkpoint else 0)
        log_line(
            f"attempt {self._attempt}: "
            + (f"from step {checkpoint.step}" if checkpoint else "from the beginning")
        )
        return StandaloneBegin(
            attempt=self._attempt,
            config_path=str(self._directory.config_json),
            config_sha256=sha256_of(self._config),
            run_directory=str(self._directory.path),
            checkpoint=str(self._directory.path / checkpoint.path) if checkpoint else None,
            manifest_sha256=checkpoint.manifest_sha256 if checkpoint else None,
            journal_head=str(journal.head),
        )

    def reject_checkpoint(self, why: str) -> StandaloneBegin:
        """Journal that the ranks could not restore what the attempt began with, and begin another
        with the one before.

        Raises:
            BadInput: there is none, or the journal takes no more.
        """
        assert self._journal is not None
        failed = self._state.attempt
        assert failed is not None
        self._append(
            CheckpointRejected(failed.checkpoint, f"a rank could not restore it: {why}"),
            failed.parent,
            failed.start_step,
        )
        return self._begin(self._journal)

    def _newest_in_place(self) -> Checkpoint | None:
        """The newest good checkpoint whose files are there in their sizes; the ranks verify what is
        in them."""
        while (checkpoint := self._state.newest_good(shared_only=True)) is not None:
            verified = self._keeper.verify(checkpoint.path, checkpoint.manifest_sha256)
            if not verified.why:
                return checkpoint
            self._append(
                CheckpointRejected(checkpoint.path, verified.why),
                checkpoint.attempt,
                checkpoint.step,
            )
        if self._state.chain():
            # Never silently from scratch.
            raise BadInput(
                f"no checkpoint of {self._directory.path} verifies; restore one of "
                f"{self._directory.checkpoints}, "
                "or choose another name= to begin anew"
            )
        return None

    # What the ranks say ---------------------------------------------------------------------------

    def tell(self, rank: int, fact: Message) -> None:
        """Record one fact; only `ShardsSaved` comes from ranks other than 0.

        Raises:
            BadInput: the journal takes no more. What it does not hold, no later start would know.
        """
        match fact:
            case InForce():
                self._append(InForceReported(fact.values))
            case Metrics():
                self._measured(fact.line)
            case Validation():
                perplexity = math.exp(min(fact.loss, 700.0))
                self._append(
                    ValidationMeasured(fact.name, fact.loss, perplexity, fact.tokens),
                    step=fact.step,
                )
                log_line(f"step {fact.step}: {perplexity_on(fact.name).lower()} {perplexity:.2f}")
            case ShardsSaved():
                self._reports[rank] = fact
                if len(self._reports) == self._config.world_size:
                    self._commit(fact.step, fact.folder)
            case SaveFailed():
                self._abandon(fact.step, fact.reason)
            case ExitNotice():
                self._left(fact)
            case _:
                pass

    def _measured(self, line: Mapping[str, object]) -> None:
        assert self._journal is not None
        assert self._state.attempt is not None
        if not self._state.attempt.began:
            seconds = round(time.time() - self._state.attempt.started, 3)
            self._append(
                TrainingBegan(self._state.attempt.generation, seconds), step=int(str(line["step"]))
            )
        try:
            self._metrics.append(self._attempt, line, str(self._journal.head))
        except OSError as error:
            if not self._loses_metrics:
                log_line(
                    f"step {line['step']}: its metrics could not be written ({error.strerror}); "
                    "training goes on"
                )
            self._loses_metrics = True
        else:
            self._loses_metrics = False
        loss, tokens = number_of(line, "loss"), number_of(line, "tokens")
        self._loss = math.nan if loss is None else loss
        self._tokens = int(tokens or self._tokens)

    def _commit(self, step: int, folder: str) -> None:
        assert self._journal is not None
        saved: list[SavedFile] = [
            file for report in self._reports.values() for file in report.files
        ]
        seconds = round(max(report.seconds for report in self._reports.values()), 3)
        self._reports = {}
        path = self._relative(self._directory.checkpoint(self._attempt, step))
        files = {file.path: (file.bytes, file.sha256) for file in saved}
        wanted = CommitManifest(path, folder, self._attempt, step, files, seconds)
        done = self._keeper.commit(wanted, self._journal.head.hash)
        if done.why:
            self._abandon(step, done.why)
            self._keeper.retire(path)  # the shards would fill the disk that the next save needs
            return
        committed = CheckpointCommitted(
            path, done.manifest_sha256, done.bytes, done.files, done.seconds, done.healthy
        )
        self._append(committed, step=step)
        self._retire()

    def _abandon(self, step: int, why: str) -> None:
        path = self._relative(self._directory.checkpoint(self._attempt, step))
        self._append(SaveAbandoned(path, why), step=step)
        log_line(f"step {step}: the checkpoint could not be saved: {why}")

    def _retire(self) -> None:
        """Drop what the rule of retention keeps no longer; training does not wait for the file
        system."""
        for checkpoint in dispensable(self._state, self._config):
            self._append(CheckpointRetired(checkpoint.path), checkpoint.attempt, checkpoint.step)
            self._removing.submit(self._keeper.retire, checkpoint.path)

    def _left(self, leaving: ExitNotice) -> None:
        assert self._state.attempt is not None
        saved = max((c.step for c in self._state.chain()), default=-1)
        self.is_unsaved = leaving.code == DONE and saved != leaving.step
        outcome = {DONE: "finished", STOPPED: "stopped"}.get(leaving.code, "failed")
        outcome = "failed" if self.is_unsaved else outcome
        self._append(
            AttemptEnded(self._state.attempt.generation, outcome), step=max(0, leaving.step)
        )
        if self.is_unsaved:
            log_line(
                f"step {leaving.step} is done, but in no checkpoint; start again to train the "
                "last steps again"
            )
        elif leaving.code == DONE:
            perplexity = self._state.validation.perplexity if self._state.validation else math.nan
            seconds = round(time.time() - self._state.created_time, 3)
            self._append(
                RunFinished(self._loss, perplexity, self._tokens, seconds), step=leaving.step
            )
        elif leaving.code == STOPPED:
            by = leaving.reason.partition(";")[0].removeprefix("asked to stop by ")
            self._append(RunStopped(by, saved), step=leaving.step)
        else:
            log_line(f"opt-train: {leaving.reason}")

    # The record -----------------------------------------------------------------------------------

    def _append(self, event: Event, attempt: str | None = None, step: int | None = None) -> None:
        assert self._journal is not None
        entry = Entry(
            round(time.time(), 3), self._attempt if attempt is None else attempt, step, event
        )
        try:
            appended = self._journal.append(entry)
        except OSError as error:
            raise BadInput(
                f"{self._directory.journal}: {error.strerror}; make room or mend it, and start "
                "again"
            ) from None
        self._state = fold(self._state, appended)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._directory.path).as_posix()

    def close(self) -> None:
        """Give the run back, when what was retired is gone."""
        self._removing.shutdown()
        self._metrics.close()
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            self._lock.release()
