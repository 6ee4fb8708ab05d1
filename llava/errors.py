"""The one exception that is written for people, and how a command ends.

Raise `UserError` where the input, not the code, is at fault: one sentence that names the thing and the
remedy. `exit_status` prints it to stderr and makes it status 2; `--debug` shows the traceback.
"""

import os
import sys
import traceback
from collections.abc import Callable


class UserError(Exception):
    """Bad input: message = one clear sentence naming the thing and what to do about it."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the exception's name where the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def exit_status(command: Callable[[], int], *, name: str, debug: bool = False) -> int:
    """What a process returns that is nothing but `command()`.

    Args:
        command: returns 0 (fine) or 1 (the answer is "no").
        name: what its errors begin with, e.g. "llava chat".
        debug: print the traceback of a UserError instead of its sentence.

    Returns:
        the command's own status; 2 after a UserError, 130 after Ctrl-C.
    """
    try:
        status = command()
        sys.stdout.flush()  # a reader that has left is noticed here, not at the interpreter's exit
        return status
    except UserError as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `llava ... | head`. Point stdout at nothing, so that the interpreter's own flush stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
