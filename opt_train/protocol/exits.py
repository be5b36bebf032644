"""Exit codes of a rank and of the command line, and the one exception that becomes a sentence."""

# 75 and 78 are EX_TEMPFAIL and EX_CONFIG of sysexits.h, and 81 lies behind its last. All are below
# 126, where the codes of shells and, from 128 on, those of signals begin.
DONE = 0
NO = 1
BAD_INPUT = 2
PERSON_MUST_DECIDE = 3
STOPPED = 75
"""Asked to stop, state saved (EX_TEMPFAIL: start me again)."""
INTERRUPTED, TERMINATED = 130, 143
"""What a shell reports for a program that Ctrl-C or TERM ended; nothing of it needs saving."""
RANK_BAD_CONFIG = 78
RANK_UNSTABLE = 81
"""Non-finite or unstable; the supervisor decides."""


class BadInput(Exception):
    """What a user gave cannot work. The message is one sentence that names the key or file and the
    mend; exit 2."""
