"""Columns of a data set, made by a frozen model: what annotators say of every token, written once.

    python -m jaxpost.annotate --config=configs/dpo.py --workdir=W --config.model=FOLDER --config.data=FILE --what=ref_logps
    python -m jaxpost.annotate --config=configs/distill.py --out=FOLDER2 --config.model=TEACHER --config.data=FILE --what=topk

The data is a stage's: read, tokenised, packed and held out as a run with the same recipe has it. The model is the one that the
stage starts from. With --workdir the columns go where that run looks for its reference; a folder of one's own (--out) is named
to a stage by `config.annotations`. The same command goes on after an interruption, and does nothing where all is done.

--what is an annotator of annotators/ (ref_logps, logps, perplexity, reward, embedding, topk, hidden), FILE.py:function with
(forward, params, batch) -> {column: [B,S,...]}, or a JSON object with its name and keywords: '{"name": "topk", "k": 32}'.
"""

import json

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxpost import recipe, sharding
from jaxpost.config import cli, links, resolve
from jaxpost.config.naming import named
from jaxpost.config.resolve import entry_of, nearest
from jaxpost.errors import UserError
from jaxpost.stages import annotate as annotating
from jaxpost.stages import columns
from jaxpost.stages.run import Run
from jaxpost.storage import cloud, compile_cache


def annotate(config, what, *, workdir="", out="", stage="", trust=(), **changes) -> list[str]:
    """Makes an annotator's columns for the data sets of a recipe's stage; the folders that they lie in, one a data set.

    config and changes: as `jaxpost.train` takes them; what: the annotator's name, a dict with it and its keywords, or the
    function itself; out: a folder, else the workdir's own; stage: which one, where the recipe has several; trust: as
    `jaxpost.train` takes it. Raises UserError for whatever the recipe gets wrong, and for a stage without a data set.
    """
    compile_cache.keep()
    resolve.trust(trust)
    stages = dict(recipe.stages(recipe.opened(config, **changes)))
    names = list(stages)
    if not stage and len(names) > 1:
        raise UserError(f"--stage=... is required: the recipe has {', '.join(names)}.")
    if stage and stage not in names:
        raise UserError(f"--stage={stage}: the recipe has no such stage.{nearest(stage, names)}")
    if not (workdir or out):
        raise UserError("--out=... is required where there is no --workdir: the folder for the columns.")
    stage = stage or names[0]
    settings = recipe.plain(stages[stage]) | {"with": named({"annotator": what}, ())["annotator"], "annotations": ""}
    if settings["source"] == "rollouts" or any(
        name for key in ("data", "eval_data") for name in links.references(settings[key])
    ):
        raise UserError(f"--stage={stage}: its data are made only when it runs; name another.")
    settings["start"] = settings["start"] if workdir else ""
    mesh = sharding.make_mesh(**settings["mesh"])
    run = Run(cloud.path(workdir or out), cloud.path(out or workdir), mesh, None, {}, {})
    with sharding.use(mesh):
        plan = annotating.planned(stage, ConfigDict(settings), run)
        return annotating.columns_of(plan, run, run.root if out else run.root / "columns")


def main(_) -> None:
    """The command line; see the module's docstring."""
    options = flags.FLAGS
    config, what = cli.required("config", "what")
    folders = annotate(config, entry_of(what, "--what"), workdir=options.workdir, out=options.out, stage=options.stage)
    if jax.process_index() == 0:
        shapes = {folder: {name: list(x.shape) for name, x in columns.read(folder).items()} for folder in folders}
        print(json.dumps(shapes, indent=2))


if __name__ == "__main__":
    flags.DEFINE_string("what", None, "The annotator: a name (ref_logps, topk), FILE.py:function, or JSON with its keywords.")
    flags.DEFINE_string("workdir", "", "The run that it is for: columns go into it, earlier stages' weights come from it.")
    flags.DEFINE_string("out", "", "Folder for the columns, to be named in config.annotations; the workdir's own if empty.")
    flags.DEFINE_string("stage", "", "Which of the recipe's stages, where there are several.")
    cli.run(
        main,
        "Makes columns of a data set.\n\n    python -m jaxpost.annotate --config=RECIPE --workdir=W --what=ref_logps",
        config=True,
        distributed=True,
    )
