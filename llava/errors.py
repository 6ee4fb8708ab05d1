"""The one exception that is written for people.

Raise `UserError` where the input, not the code, is at fault: one sentence that names the thing and the
remedy. The command line prints it to stderr and exits with status 2; `--debug` shows the traceback.
"""


class UserError(Exception):
    """Bad input: message = one clear sentence naming the thing and what to do about it."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the exception's name where the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
