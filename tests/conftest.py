"""What holds for every test."""

import signal

# Workers of pytest-xdist ignore it, and the programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
