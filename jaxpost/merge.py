"""Several models' weights become one, between folders: mergekit's methods, and functions of your own.

    python -m jaxpost.merge --with=ties --base=FOLDER --of=FOLDER2 --of=FOLDER3 --out=FOLDER4

A model is a Hugging Face folder, a name on the hub, a workdir, or one checkpoint in a workdir. They are read one tensor after
another and the result is written as it is computed, so memory holds a few of the largest tensors, however many there are (of a
workdir two parameters, with all their layers). Sums are float32 and rounded once. The folder appears under its name when it is
whole.

--with is a method of merging/ (linear, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, slerp,
model_stock, fisher, regmean), FILE.py:function, or a JSON object with its name and keywords, such as
'{"name": "ties", "density": 0.3}'; docs/merging.md has them, and mergekit's keys.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from jaxpost import export
from jaxpost.config import cli
from jaxpost.config.resolve import entry_of, resolve
from jaxpost.errors import UserError
from jaxpost.merging import tensorwise
from jaxpost.models import hf, layout, loading, tensors
from jaxpost.stages import merge as merging
from jaxpost.storage import checkpoint, cloud


def merge(what: Any, of: Sequence[str], out: str, *, base: str = "", dtype: str | None = None) -> list[str]:
    """Writes the merge of models to the folder `out`; returns the files' names.

    what: a merge's name, a dict with it and its keywords, or the function itself. base: the model that the others were tuned
    from, for the methods that have one. config.json, the tokenizer and the rest are those of the base, else of the first model.
    dtype: one of export.DTYPES; None is config.json's, else float32. Raises UserError, before any weights are read, for models
    that differ in architecture or tokenizer, for keywords that do not suit the method, and where `out` is not empty.
    """
    folder = checkpoint.absolute(cloud.path(out))
    export.check_empty(folder, f"--out={out}")
    function = resolve(merging.entry(what), "merging")
    takes_base = getattr(tensorwise.declaration(function), "base", bool(base))
    if takes_base != bool(base):
        about = "is required: this method changes a base" if takes_base else "is no part of this method; leave it out"
        raise UserError(f"--base=... {about}.")
    names = [*([base] if base else []), *of]
    specs = [loading.describe(name) for name in names]
    for name, spec in zip(names, specs, strict=True):
        loading.check(spec)
        export.check_leaves(spec, name)
    merging.check(function, list(zip(names, specs, strict=True)), "--of")
    first, arch = specs[0], specs[0].transformer.arch
    kind = hf.format_of(first.config, dtype)
    # Renaming is no way to finish a folder in a bucket; there config.json, which every reader asks for, comes last.
    place = folder if cloud.is_remote(folder) else folder.parent / f".{folder.name}.unfinished"
    if place != folder and place.exists():
        place.rmtree()
    place.mkdir(parents=True, exist_ok=True)
    where = layout.places(arch)
    stream = tensorwise.stream(function, [tensors.opened(spec) for spec in specs], where, arch.layers, kind)
    hf.write_shards(place, {name: (kind, shape) for name, (shape, _) in where.items()}, (array for _, array in stream))
    export.describe(place, first)
    hf.save_config(place, arch, export.config_of(first), dtype)
    if place != folder:
        if folder.exists():
            folder.rmdir()  # it is empty
        place.rename(folder)
    return sorted(path.name for path in folder.iterdir())


def main(_) -> None:
    """The command line; see the module's docstring."""
    what, of, out = cli.required("with", "of", "out")
    names = merge(entry_of(what, "--with"), of, out, base=flags.FLAGS.base, dtype=flags.FLAGS.dtype)
    print(f"{out}: {', '.join(names)}")


ABOUT = """Merges the weights of several models into one Hugging Face folder.

    python -m jaxpost.merge --with=linear --of=FOLDER --of=FOLDER2 --out=FOLDER3
    python -m jaxpost.merge --with='{"name": "ties", "density": 0.3}' --base=FOLDER --of=FOLDER2 --of=FOLDER3 --out=FOLDER4

A model is a Hugging Face folder, a name on the hub, a workdir, or a checkpoint in one.
"""

if __name__ == "__main__":
    flags.DEFINE_string("with", None, "The method: a name (linear, ties), FILE.py:function, or JSON with its keywords.")
    flags.DEFINE_multi_string("of", [], "A model to merge; give the flag once for each.")
    flags.DEFINE_string("base", "", "The model that the others were tuned from, for the methods that have one.")
    flags.DEFINE_string("out", None, "The folder to write; it must be new or empty.")
    flags.DEFINE_enum("dtype", None, export.DTYPES, "Number format of the weights (default: what config.json names).")
    cli.run(main, ABOUT, model=True)
