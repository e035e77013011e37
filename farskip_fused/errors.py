"""The two errors that a user of the package meets."""


class UsageError(ValueError):
    """A wrong argument, file or environment: says what was given, what is needed and what to do.

    The command line turns it into one sentence and exit code 2; everything else keeps its traceback.
    """


class PeerTimeout(RuntimeError):
    """A bounded wait of a kernel expired: names the rank, peer, phase, epoch, expected and seen."""
