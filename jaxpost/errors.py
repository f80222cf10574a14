"""The one exception for what a user can put right."""


class UserError(ValueError):
    """A mistake in the input, with its place and its remedy in the message.

    The command-line entry points print the message alone and exit with status 2; no traceback, since it would only hide the
    text.
    """
