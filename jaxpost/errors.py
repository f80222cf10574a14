"""The one exception for what a user can put right, and what it says of one from elsewhere."""

import re

# C0 and C1 controls, and those that turn the direction of writing around.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class UserError(ValueError):
    """A mistake in the input, with its place and its remedy in the message.

    The command-line entry points print the message alone and exit with status 2; no traceback, since it would only hide the
    text. A name from a file may hold control characters, which a terminal would obey: they are shown spelled out.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """The text with its control characters spelled out (\\x1b), line breaks and tabs aside."""
    return _CONTROL.sub(lambda m: repr(m[0])[1:-1], text)


def first_line(error: Exception) -> str:
    """The first line of what an error of a library says, at most 300 characters of it, printable; its kind where it says
    nothing."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0][:300])
