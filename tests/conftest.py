"""What holds for every test, and the fixtures that more than one room asks for."""

import signal

from tests.command import prepared_once, say, workplace

__all__ = ["prepared_once", "say", "workplace"]

# Workers of pytest-xdist ignore it, and the programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
