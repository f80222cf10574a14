"""The command line of the entry points: flags in, and one clear message when something is wrong."""

import os
import re
import shlex
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from absl import app, flags, logging

from jaxpost import recipe
from jaxpost.config import startup
from jaxpost.config.naming import ENTRIES
from jaxpost.config.resolve import trust
from jaxpost.errors import UserError
from jaxpost.recipe import DEFAULTS
from jaxpost.storage import compile_cache, host


def run(
    main: Callable,
    about: str,
    config: bool = False,
    model: bool = False,
    *,
    distributed: bool = False,
    devices: bool = True,
) -> None:
    """Runs main(argv) as an absl app; `about` heads its --help. config: whether it takes a recipe (--config, with keys as
    --config.key=value); model: whether it opens a model without a recipe. Both have --trust. distributed: whether it may be one
    of several processes (--distributed); devices: whether it computes on this machine's devices.

    A UserError, a wrong flag or a wrong config key prints its message only, with exit status 2. Any other error is a bug and
    keeps its traceback.
    """
    sys.modules["__main__"].__doc__ = about
    _define(config, model or config, distributed)

    def parse(argv):
        try:
            if config:
                argv, keywords = _new_keywords(_find_recipe(argv))
                sys.argv[:] = argv  # ml_collections reads sys.argv, not its argument
            rest = flags.FLAGS(argv)
            if config and flags.FLAGS.config is not None:
                for path, value in keywords:
                    recipe.put(flags.FLAGS.config, path, value)
            return rest
        except Exception as e:  # a recipe is the user's code, and may raise anything
            _fail(_explain(e, argv))

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # Orbax narrates every file it renames
        if argv[1:]:
            _fail(f"unexpected argument {argv[1]!r}; settings are given as --name=value. See --help.")
        compile_cache.keep()
        trust(flags.FLAGS.trust if model or config else [])
        try:
            with host.disk_errors("a file"):
                if devices:
                    startup.start(distributed and flags.FLAGS.distributed)
                main(argv)
        except UserError as e:
            _fail(str(e))

    app.run(guarded, flags_parser=parse)


def _explain(error: Exception, argv: list[str]) -> str:
    """The message for an error in a recipe or in a key that the command line changes, with its place."""
    while "Traceback" in str(error) and error.__context__:  # absl wraps some errors, with a traceback in the message
        error = error.__context__
    with_recipe = any(argument.startswith("--config") for argument in argv)
    if isinstance(error, flags.UnrecognizedFlagError) and with_recipe and error.flagname in DEFAULTS:
        return f"--{error.flagname}: a recipe's setting is given as --config.{error.flagname}=..."
    if isinstance(error, (flags.Error, UserError)):
        return str(error)
    if isinstance(error, (AttributeError, KeyError)) and (wrong := _unknown(argv)):
        path, word = wrong
        choices = _siblings(path, word)
        absent = " Set it in the recipe; the command line only changes what is there."
        hint = absent if word in choices else recipe.hint(word, choices)
        stage = " A further stage is written in a recipe of your own (docs/stages.md)." if word in path[1:-1] else ""
        return f"--{'.'.join(path)}: the recipe has no key {word!r} there.{hint}{stage}"
    libraries = (str(Path(__file__).parents[1]), sysconfig.get_path("stdlib"), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    places = [f"{f.filename}, line {f.lineno}: " for f in frames if "site-packages" not in f.filename]
    return f"the recipe could not be read: {places[-1] if places else ''}{type(error).__name__}: {error}"


def _siblings(path: list[str], word: str) -> Mapping:
    """The settings beside a key of the path; a stage has the same settings as the recipe around it."""
    level = DEFAULTS
    for part in path[1 : path.index(word)]:
        level = level.get(part, DEFAULTS)
    return level if isinstance(level, Mapping) else {}


def _unknown(argv: list[str]) -> tuple[list[str], str] | None:
    """The first --config.a.b on the command line that the recipe lacks: its path, and the part of it that is unknown."""
    try:
        config = _recipe(argv)
    except Exception:  # then the recipe itself is wrong
        return None
    for argument in argv:
        if argument.startswith("--config."):
            path, level = argument.lstrip("-").partition("=")[0].split("."), config
            for part in path[1:]:
                if not isinstance(level, Mapping) or part not in level:
                    return path, part
                level = level[part]
    return None


def _recipe(argv: list[str]) -> Mapping:
    """The recipe named on the command line, as plain dicts, before the command line changes it."""
    value = next(a.partition("=")[2] for a in argv if a.startswith("--config="))
    return recipe.opened(value).to_dict()


def _new_keywords(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(the other arguments, [(path, value)] of keywords of functions that the recipe does not mention).

    ml_collections only changes keys that exist, but the keywords of an objective or a task are up to the function. It also
    refuses a folder where the recipe has a model's fields, so `model` is among them.
    """
    pattern = re.compile(rf"--config\.((?:\w+\.)?(?:(?:{'|'.join(ENTRIES)})(?:\.[\w-]+)+|model|evals))=(.*)", re.DOTALL)
    settings = [m.groups() for a in argv if (m := pattern.fullmatch(a))]
    if not settings or not any(a.startswith("--config=") for a in argv):
        return argv, []
    config = _recipe(argv)
    added = [
        (path, value) for path, value in settings if not recipe.has(config, path) or path.split(".")[-1] in ("model", "evals")
    ]
    return [a for a in argv if a not in [f"--config.{path}={value}" for path, value in added]], added


def _find_recipe(argv: list[str]) -> list[str]:
    """The arguments with --config=PATH first, as ml_collections needs it, and its path resolved: a file, or a recipe that comes
    with jaxpost.

    Raises UserError where there is no such file: ml_collections would only fail when it is used.
    """
    out, rest = [], iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            argument = f"--config={recipe.located(value if equals else next(rest, ''))}"
        out.append(argument)
    first = [a for a in out[1:] if a.startswith("--config=")]
    if not first and any(a.startswith("--config.") for a in out):
        raise UserError("--config=... is required: the recipe that the settings --config.key=value change. See --help.")
    return [*out[:1], *first, *(a for a in out[1:] if a not in first)]


def _define(config: bool, trusted: bool, distributed: bool) -> None:
    """Defines the flags that several commands have."""
    if config:
        from ml_collections import config_flags

        what = "Recipe: a Python file with get_config(); settings: --config.key=value."
        config_flags.DEFINE_config_file("config", None, what)
    if trusted:
        what = "A function of your own, FILE.py:function, that a model's files may name as its adapter or as what makes it."
        flags.DEFINE_multi_string("trust", [], what)
    if distributed:
        what = "Several processes (a TPU pod slice, a GPU cluster): start jax.distributed first."
        flags.DEFINE_bool("distributed", False, what)
    for name, has in (("config", config), ("trust", trusted), ("distributed", distributed)):
        if has:  # --help only lists the main module's flags
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def command(changes: Mapping[str, str]) -> str:
    """This process's command with some flags changed, as {"workdir": "runs/2"}; "" where it is no command of jaxpost."""
    modules = [
        i for i, argument in enumerate(sys.orig_argv) if i and sys.orig_argv[i - 1] == "-m" and argument.startswith("jaxpost.")
    ]
    if not modules:
        return ""
    called, arguments = sys.orig_argv[: modules[0] + 1], sys.orig_argv[modules[0] + 1 :]
    kept, rest = [], iter(arguments)
    for argument in rest:
        name, equals, _ = argument.lstrip("-").partition("=")
        if not any(name == other or name.startswith(f"{other}.") for other in changes):
            kept.append(argument)
        elif not equals:
            next(rest, None)  # its value
    return shlex.join([*called, *kept, *(f"--{name}={value}" for name, value in changes.items())])


def required(*names: str) -> list:
    """The values of flags that must be given. Raises UserError naming the first that is not."""
    for name in names:
        if not flags.FLAGS[name].value:
            text = flags.FLAGS[name].help.partition(";\n")[0]  # absl adds a line for a flag with several values
            raise UserError(f"--{name}=... is required: {text.removesuffix('.')}. See --help.")
    return [flags.FLAGS[name].value for name in names]


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    # Threads of a prefetching pipeline must not keep a failed command alive, nor bury its message under theirs.
    os._exit(2)
