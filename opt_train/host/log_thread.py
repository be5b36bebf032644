"""Log lines written by a thread, so that a sick disk stalls nobody."""

import logging
import logging.handlers
import queue


def written_beside(
    handler: logging.Handler,
) -> tuple[logging.handlers.QueueHandler, logging.handlers.QueueListener]:
    """What a logger is given instead of `handler`, and the thread that hands on to `handler` once
    it is started."""
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    queued = logging.handlers.QueueHandler(lines)
    queued.setFormatter(logging.Formatter("%(message)s"))  # `handler` adds the rest
    return queued, logging.handlers.QueueListener(lines, handler)
