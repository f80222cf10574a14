"""How an entry point meets its user: flags in, one clear message out when something is wrong."""

import os
import sys
from collections.abc import Callable

from absl import app, flags, logging

from jaxpost.errors import UserError


def run(main: Callable, about: str, config: bool = False) -> None:
    """Runs main(argv) as an absl app; `about` heads its --help.

    A UserError, a wrong flag or a wrong config key ends with its message alone and exit status 2; anything else is a bug and
    keeps its traceback. Recipes' keys (with `config`) are given as --config.key=value.
    """
    sys.modules["__main__"].__doc__ = about
    if config:
        _define_config()

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except (
            flags.Error,
            UserError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            OSError,
            ImportError,
            SyntaxError,
        ) as e:
            _fail(f"{type(e).__name__ if not isinstance(e, (flags.Error, UserError)) else ''}: {e}".lstrip(": "))

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # Orbax narrates every file it renames
        if argv[1:]:
            _fail(f"unexpected argument {argv[1]!r}; settings are given as --name=value. See --help.")
        try:
            main(argv)
        except UserError as e:
            _fail(str(e))

    app.run(guarded, flags_parser=parse)


def _define_config() -> None:
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "Recipe: a Python file with get_config(); settings: --config.key=value.")


def required(*names: str) -> list:
    """The values of flags that must be given. Raises UserError naming the first that is not."""
    for name in names:
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name}=... is required: {flags.FLAGS[name].help} See --help.")
    return [flags.FLAGS[name].value for name in names]


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    # Threads of a prefetching pipeline must not keep a failed command alive, nor bury its message under theirs.
    os._exit(2)
