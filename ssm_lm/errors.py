"""The one exception that a user is meant to see, and the exit code of what can go on."""

PREEMPTED = 75  # of a run that was asked to end: EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """Something the user gave is wrong: an argument, a key of a config, a file, a folder.

    The message is one line that names the key or the file, what was wrong with it, and the way out. The command
    line prints it to stderr without a traceback and ends with exit code 2.
    """


def one_line(error: BaseException) -> str:
    """The message of an error of some library, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of such a message, for libraries that go on with advice to programmers."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
