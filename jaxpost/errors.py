"""The one exception for what a user can put right, and what it says of one from elsewhere."""


class UserError(ValueError):
    """A mistake in the input, with its place and its remedy in the message.

    The command-line entry points print the message alone and exit with status 2; no traceback, since it would only hide the
    text.
    """


def first_line(error: Exception) -> str:
    """The first line of what an error of a library says, at most 300 characters of it; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
