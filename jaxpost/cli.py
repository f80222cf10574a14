"""How an entry point meets its user: flags in, one clear message out when something is wrong."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from absl import app, flags, logging

from jaxpost.errors import UserError
from jaxpost.recipe import DEFAULTS
from jaxpost.resolve import nearest


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
            if config:
                _find_recipe(argv)
            return flags.FLAGS(argv)
        except Exception as e:  # a recipe is the user's code, and may raise anything
            _fail(_explain(e, argv))

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # Orbax narrates every file it renames
        if argv[1:]:
            _fail(f"unexpected argument {argv[1]!r}; settings are given as --name=value. See --help.")
        try:
            main(argv)
        except UserError as e:
            _fail(str(e))

    app.run(guarded, flags_parser=parse)


def _explain(error: Exception, argv: list[str]) -> str:
    """What was wrong with a recipe or with a key that the command line gives it, and where."""
    while "Traceback" in str(error) and error.__context__:  # absl wraps some errors, with a traceback in the message
        error = error.__context__
    if isinstance(error, (flags.Error, UserError)):
        return str(error)
    word = (re.findall(r"\w+", str(error)) or [""])[0]
    given = [a.lstrip("-").partition("=")[0] for a in argv if a.startswith("--config.")]
    if isinstance(error, (AttributeError, KeyError)) and (wrong := [k for k in given if word in k.split(".")]):
        absent = " Set it in the recipe; the command line only changes what is there."
        known = _known_beside(wrong[0].split("."), word)
        return f"--{wrong[0]}: the recipe has no key {word!r} there.{absent if word in known else nearest(word, known)}"
    own = str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((own, "<"))]
    places = [f"{f.filename}, line {f.lineno}: " for f in frames if "site-packages" not in f.filename]
    return f"the recipe could not be read: {places[-1] if places else ''}{type(error).__name__}: {error}"


def _known_beside(path: list[str], word: str) -> Mapping:
    """The settings among which a key of the path stands; a stage holds the same as the recipe around it."""
    level = DEFAULTS
    for part in path[1 : path.index(word)]:
        level = level.get(part, DEFAULTS)
    return level if isinstance(level, Mapping) else {}


def _find_recipe(argv: list[str]) -> None:
    """Raises UserError where --config names no file: ml_collections would go on with a stand-in until it is used."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            path = (value if equals else following).partition(":")[0]
            if not Path(path).is_file():
                raise UserError(f"--config={path}: no such file. Give a recipe, such as configs/sft.py.")


def _define_config() -> None:
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "Recipe: a Python file with get_config(); settings: --config.key=value.")
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])  # --help lists the main module's alone


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
