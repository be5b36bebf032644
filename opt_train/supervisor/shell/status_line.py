"""What a person at the terminal sees: one line that redraws itself, or a line now and then where
none can redraw."""

import os
import threading
import time
from typing import TextIO

from opt_train.supervisor.effects import Show


class StatusLine:
    """Shows the newest `Show`. Writing happens in a thread of its own: a terminal that does not
    take it (a stopped pager, a full pipe) makes nobody wait, and misses lines instead.
    """

    def __init__(self, stream: TextIO, interval_seconds: float) -> None:
        self._stream = stream
        self._interval = interval_seconds
        self._redraws = stream.isatty()
        self._newest: Show | None = None
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._closed = False
        self._drawn = ""
        # A daemon: a write to a stopped terminal may never return, and must not keep the process.
        self._thread = threading.Thread(target=self._write, name="status line", daemon=True)
        self._thread.start()

    def show(self, show: Show) -> None:
        """Show this instead of what was shown before."""
        with self._news:
            self._newest = show
            self._news.notify()

    def add_line(self, sentence: str) -> None:
        """A line that stays."""
        with self._news:
            # A terminal that takes nothing for a month must not take the memory.
            self._lines = [*self._lines[-99:], sentence]
            self._news.notify()

    def close(self) -> None:
        """Write what is left, if the terminal takes it within a second."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join(1.0)

    def _write(self) -> None:
        shown: Show | None = None
        shown_at = float("-inf")
        while True:
            with self._news:
                while not (self._closed or self._lines or self._newest is not shown):
                    self._news.wait()
                newest, lines, self._lines, closed = self._newest, self._lines, [], self._closed
            try:
                for sentence in lines:
                    self._line(printable(sentence))
                due = time.monotonic() - shown_at >= (0.1 if self._redraws else self._interval)
                if (
                    newest is not None
                    and newest is not shown
                    and (closed or due or _differs(newest, shown))
                ):
                    self._draw(describe(newest))
                    shown, shown_at = newest, time.monotonic()
                if closed:
                    if self._redraws and self._drawn:
                        self._stream.write("\n")
                        self._stream.flush()
                    return
            except (OSError, ValueError):  # nobody reads any more, or the stream was closed
                return
            if newest is not shown:
                time.sleep(0.1)

    def _draw(self, text: str) -> None:
        if not self._redraws:
            self._line(text)
            return
        try:
            columns = (
                os.get_terminal_size(self._stream.fileno()).columns or 80
            )  # 0: it does not know
        except OSError:
            columns = 80
        self._drawn = text[: max(1, columns - 1)]
        self._stream.write(f"\r{self._drawn}\x1b[K")
        self._stream.flush()

    def _line(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}\n{self._drawn}" if self._redraws else f"{text}\n")
        self._stream.flush()


def describe(show: Show) -> str:
    """`show` as one line."""
    parts = [f"{show.stage:<10}"]
    if show.attempt:
        parts.append(f"attempt {show.attempt}")
    parts.append(f"step {max(0, show.step)}/{show.steps}")
    if show.loss is not None:
        parts.append(f"loss {show.loss:.3f}")
    if show.tokens_per_second is not None:
        parts.append(f"{show.tokens_per_second:,.0f} tokens/s")
    parts.append(f"nodes {show.active_nodes}+{show.buffer_nodes}")
    if show.waiting_for:
        parts.append(f"waiting for {show.waiting_for}")
    if show.last_incident:
        parts.append(f"last incident: {show.last_incident}")
    return printable("  ".join(parts))


def printable(text: str) -> str:
    """`text` without what could command a terminal: it may quote a log."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _differs(new: Show, old: Show | None) -> bool:
    return old is None or (new.stage, new.attempt, new.last_incident) != (
        old.stage,
        old.attempt,
        old.last_incident,
    )
