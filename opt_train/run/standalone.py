"""A run without agents and supervisor: the lock, the journal, the metrics and the checkpoints of
ranks that somebody started by hand.

The events are built by `run/entries.py`, checkpoints are kept by `run/checkpoint_keeper.py` and
dropped by `run/retention.py`, as under a supervisor, so that nobody who reads the run directory can
tell who wrote it. What is missing is the judgement: nobody restarts the ranks, diagnoses them or
gives them orders.
"""

import math
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opt_logbook.record.events import (
    AttemptEnded,
    CheckpointRejected,
    CheckpointRetired,
    Entry,
    Event,
    InForceReported,
    LineageOpened,
    RunCreated,
    RunStopped,
    SaveAbandoned,
)
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock, LockHeld
from opt_logbook.record.metrics import MetricsWriter, number_of
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.story.format import perplexity_on

from opt_train.clusters.make_cluster import make_cluster
from opt_train.config.run_config import RunConfig, sha256_of
from opt_train.data.verify import verify_dataset
from opt_train.protocol.exits import DONE, STOPPED, BadInput
from opt_train.protocol.facts import (
    ExitNotice,
    InForce,
    Metrics,
    SaveFailed,
    ShardsSaved,
    Validation,
)
from opt_train.protocol.framing import Message
from opt_train.protocol.standalone import StandaloneBegin
from opt_train.run.admission import (
    admitted_data,
    check_room,
    check_weights_fit_data,
    damage_question,
)
from opt_train.run.checkpoint import Checkpoint, path_of_save
from opt_train.run.checkpoint_keeper import CheckpointKeeper
from opt_train.run.code.code_state import read_code_state
from opt_train.run.entries import (
    attempt_started,
    checkpoint_committed,
    run_created,
    run_finished,
    training_began,
    validation_measured,
)
from opt_train.run.fabric_settings import settings_difference
from opt_train.run.fold import fold
from opt_train.run.hold_requests import journal_holds, why_held
from opt_train.run.ledger import TakenLedger, to_json
from opt_train.run.lineage import RunStart, write_configuration
from opt_train.run.retention import dispensable
from opt_train.run.state import RunState


class StandaloneRun:
    """Holds the run's lock and writes its record while ranks train. Used on rank 0 alone."""

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        start: RunStart,
        report: Callable[[str], None],
        taken: TakenLedger | None = None,
    ) -> None:
        """Nothing is opened or written yet.

        Args:
            report: called with sentences for a person.
            taken: the ledger of another run that a new one begins with.
        """
        self._directory = directory
        self._config = config
        self._start = start
        self._report = report
        self._taken = taken
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
        """The newest line could not be written, and that has been reported."""
        self.question = ""
        """What a person must decide before training can begin."""
        self.is_unsaved = False
        """All steps are done, but the last checkpoint could not be committed."""

    @property
    def created(self) -> RunCreated | None:
        """The first line of the journal; None: it is not open yet."""
        return self._state.created

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
        if self._state.created is not None:
            journal_holds(self._directory, self._state.hold, self._append)
        if held := why_held(self._directory):  # since it was asked for the first time
            raise BadInput(held)
        if start.is_new:
            self._append(run_created(config, data, self._taken))
        if start.is_new or start.opens_lineage:
            self._append(
                LineageOpened(
                    start.lineage, sha256_of(config), start.lineage_difference, start.code_sha256
                )
            )
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
        started = attempt_started(
            checkpoint,
            read_code_state(),
            generation=state.generation + 1,
            nodes=(socket.gethostname(),),
            world_size=self._config.world_size,
            reason="started alone, without a supervisor",
            config_sha256=sha256_of(self._config),
            difference=self._start.operational_difference,
        )
        self._append(started, step=checkpoint.step if checkpoint else 0)
        where = f"from step {checkpoint.step}" if checkpoint else "from the beginning"
        self._report(f"attempt {self._attempt}: {where}")
        return StandaloneBegin(
            attempt=self._attempt,
            config_path=str(self._directory.config_json),
            config_sha256=sha256_of(self._config),
            run_directory=str(self._directory.path),
            checkpoint=str(self._directory.path / checkpoint.path) if checkpoint else None,
            manifest_sha256=checkpoint.manifest_sha256 if checkpoint else None,
            journal_head=str(journal.head),
            # What a supervised attempt was ordered to change for good stays changed, whoever keeps
            # the journal now.
            order_number=state.settled_order,
            ledger=tuple(to_json(state.ledger)),
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

    # What the ranks report ------------------------------------------------------------------------

    def record(self, rank: int, fact: Message) -> None:
        """Record one fact; only `ShardsSaved` comes from ranks other than 0.

        Raises:
            BadInput: the journal takes no more. What it does not hold, no later start would know.
        """
        match fact:
            case InForce():
                before = self._state.fabric_settings
                changed = () if before is None else settings_difference(before, fact.environment)
                event = InForceReported(fact.values, fact.environment, changed, fact.seconds)
                self._append(event)
            case Metrics():
                self._record_metrics(fact.line)
            case Validation():
                measured = validation_measured(fact.name, fact.loss, fact.tokens)
                self._append(measured, step=fact.step)
                what = perplexity_on(fact.name).lower()
                self._report(f"step {fact.step}: {what} {measured.perplexity:.2f}")
            case ShardsSaved():
                self._reports[rank] = fact
                if len(self._reports) == self._config.world_size:
                    self._commit(fact.step, fact.folder)
            case SaveFailed():
                self._abandon(fact.step, fact.reason)
            case ExitNotice():
                self._end(fact)
            case _:
                pass

    def _record_metrics(self, line: Mapping[str, object]) -> None:
        assert self._journal is not None
        assert self._state.attempt is not None
        if not self._state.attempt.began:
            began = training_began(self._state.attempt, time.time())
            self._append(began, step=int(str(line["step"])))
        try:
            self._metrics.append(self._attempt, line, str(self._journal.head))
        except OSError as error:
            if not self._loses_metrics:
                self._report(
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
        reports, self._reports = self._reports, {}
        files = {
            file.path: (file.bytes, file.sha256)
            for report in reports.values()
            for file in report.files
        }
        path = path_of_save(self._attempt, step)
        result = self._keeper.commit(
            path, folder, self._attempt, step, files, self._journal.head.hash
        )
        if result.why:
            self._abandon(step, result.why)
            self._keeper.retire(path)  # the shards would fill the disk that the next save needs
            return
        seconds = max(report.seconds for report in reports.values())
        self._append(checkpoint_committed(path, result, seconds), step=step)
        self._retire()

    def _abandon(self, step: int, why: str) -> None:
        self._append(SaveAbandoned(path_of_save(self._attempt, step), why), step=step)
        self._report(f"step {step}: the checkpoint could not be saved: {why}")

    def _retire(self) -> None:
        """Drop what the rule of retention keeps no longer; training does not wait for the file
        system."""
        for checkpoint in dispensable(self._state, self._config):
            self._append(CheckpointRetired(checkpoint.path), checkpoint.attempt, checkpoint.step)
            self._removing.submit(self._keeper.retire, checkpoint.path)

    def _end(self, notice: ExitNotice) -> None:
        assert self._state.attempt is not None
        saved = max((c.step for c in self._state.chain()), default=-1)
        self.is_unsaved = notice.code == DONE and saved != notice.step
        outcome = {DONE: "finished", STOPPED: "stopped"}.get(notice.code, "failed")
        outcome = "failed" if self.is_unsaved else outcome
        self._append(
            AttemptEnded(self._state.attempt.generation, outcome), step=max(0, notice.step)
        )
        if self.is_unsaved:
            self._report(
                f"step {notice.step} is done, but in no checkpoint; start again to train the "
                "last steps again"
            )
        elif notice.code == DONE:
            finished = run_finished(self._state, self._loss, self._tokens, time.time())
            self._append(finished, step=notice.step)
        elif notice.code == STOPPED:
            by = notice.reason.partition(";")[0].removeprefix("asked to stop by ")
            self._append(RunStopped(by, saved), step=notice.step)
        else:
            self._report(f"opt-train: {notice.reason}")

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

    def close(self) -> None:
        """Give the run back, when what was retired is gone."""
        self._removing.shutdown()
        self._metrics.close()
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            self._lock.release()
