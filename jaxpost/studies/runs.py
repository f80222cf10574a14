"""Many runs of recipes in one process, and the table that they fill.

    WORKDIR/table.jsonl          a line for each run that is done: its arm, seed, settings, figures, and what it spent
            runs/<arm>-<seed>-<key>/    its workdir, with log.txt

A run's key is a digest of its recipe, of those of the models that it names, and of a study's code. So the same runs are found
again: a process that is killed goes on with the run that it was at, and a run whose settings changed is another. Rows, columns,
figures and the models of recipes lie in jaxpost's cache folder, where all studies share them.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from jaxpost import recipe, train
from jaxpost.errors import UserError
from jaxpost.recipe import DEFAULTS, flat, plain
from jaxpost.reporting.writers import replace
from jaxpost.storage import artefacts, cloud

TABLE = "table.jsonl"


class Row(NamedTuple):
    """One run: figures, {metric: value}, of which STAGE:metric is that of one stage; spent, {learned, generated, scored:
    tokens, steps, seconds}; seconds, on the clock.
    """

    arm: str
    seed: int
    changes: dict[str, Any]
    figures: dict[str, float]
    spent: dict[str, float]
    seconds: float
    workdir: str


class Runs:
    """The runs of a study or of a sweep. recipes: {arm: ConfigDict}; code: what else runs depend on."""

    def __init__(self, workdir, recipes: Mapping[str, ConfigDict], code: str = ""):
        self.workdir, self.recipes, self.code = cloud.path(workdir), recipes, code
        self.workdir.mkdir(parents=True, exist_ok=True)
        lines = (self.workdir / TABLE).read_text().splitlines() if (self.workdir / TABLE).exists() else []
        self.rows = {row.pop("key"): Row(**row) for row in map(json.loads, lines)}

    def run(self, arm: str, seed: int, changes: Mapping[str, Any] | None = None) -> Row:
        """The run of an arm with a seed, and with settings {path: value} in place of the recipe's; once done it is kept."""
        changes = dict(changes or {})
        config = changed(self.recipes[arm], {**changes, "seed": seed}, arm)
        if not config.artefacts:
            config.artefacts = str(cloud.cache_folder())  # so that all studies share the models of recipes too
        settings = difference(config)
        key = artefacts.key({"config": settings, "models": models_of(settings), "code": self.code})
        if (row := self.rows.get(key)) is None:
            name = re.sub(r"[^\w.=-]+", "_", arm)
            folder = self.workdir / "runs" / f"{name}-{seed}-{key}"
            row = Row(arm, seed, changes, *_run(config, folder, f"{arm} seed {seed}"), workdir=str(folder))
            self.rows[key] = row
            lines = [json.dumps({"key": key, **row._asdict()}) + "\n" for key, row in self.rows.items()]
            replace(self.workdir / TABLE, "".join(lines).encode())
        return row._replace(arm=arm)  # arms with the same recipe share a run


def changed(config: ConfigDict, changes: Mapping[str, Any], arm: str) -> ConfigDict:
    """A recipe with settings {path, with dots: value} changed. Raises UserError for a path that it does not have."""
    nested: dict = {}
    settings = plain(config)
    for path, value in changes.items():
        stage, _, rest = path.partition(".")
        if not recipe.has(settings, path) and not (stage in settings["stages"] and recipe.has(DEFAULTS, rest)):
            raise UserError(f"arm {arm}: its recipe has no {path!r}{recipe.hint(path.rpartition('.')[2], flat(settings))}")
        level = nested
        *outer, last = path.split(".")
        for part in outer:
            level = level.setdefault(part, {})
        level[last] = value
    return recipe.opened(config, **nested)


def difference(config: ConfigDict) -> dict[str, Any]:
    """What a recipe changes of the defaults, {path: value}: it stays the same when a further setting is added to them."""
    names = plain(config).get("stages", ())
    defaults = flat(DEFAULTS) | {f"{name}.{path}": value for name in names for path, value in flat(DEFAULTS).items()}
    settings = flat(json.loads(config.to_json()))
    defaults = json.loads(json.dumps(defaults))
    inside = tuple(f"{name}." for name in names)
    return {
        k: v
        for k, v in settings.items()
        if k != "artefacts" and (k.startswith(inside) or k not in defaults or v != defaults[k])
    }


def models_of(settings: Mapping[str, Any]) -> dict[str, dict]:
    """{path: what the recipe there changes} of the recipes that settings name as models, and of those that these name."""
    values = [each for value in settings.values() for each in (value if isinstance(value, (list, tuple)) else [value])]
    models: dict[str, dict] = {}
    for path in (value.removeprefix("recipe:") for value in values if isinstance(value, str) and value.startswith("recipe:")):
        models[path] = difference(recipe.opened(path.replace("{seed}", "0")))
        models |= models_of(models[path])
    return models


def _run(config: ConfigDict, folder: epath.Path, title: str) -> tuple[dict, dict, float]:
    """(figures, spent, seconds on the clock) of a recipe that is run, or continued, in a folder."""
    began = time.monotonic()
    print(f"{title} ...", end=" ", file=sys.stderr, flush=True)
    with _quiet(folder / "log.txt"):
        outputs = train.outputs(config, folder)
    figures, spent = {}, {"learned": 0, "generated": 0, "scored": 0, "steps": 0, "seconds": 0.0}
    for stage, output in outputs.items():
        own = {k: v for k, v in output.figures.items() if isinstance(v, (int, float))}
        figures |= own | {f"{stage}:{name}": value for name, value in own.items()}
        for kind, amount in {**output.spent, "seconds": output.seconds}.items():
            spent[kind] += amount
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s", file=sys.stderr)
    return figures, spent, seconds


@contextlib.contextmanager
def _quiet(path: epath.Path) -> Iterator[None]:
    """What is printed inside goes to a file, whose place is said where the run does not end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            yield
    except BaseException:
        print(f"stopped; its output is in {path}", file=sys.stderr)
        raise


def grid(vary: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """{name: {setting: value}} of each combination of values."""
    combinations: list[dict] = [{}]
    for path, values in vary.items():
        combinations = [{**one, path: value} for one in combinations for value in values]
    return {", ".join(f"{path}={value}" for path, value in one.items()) or "config": one for one in combinations}
