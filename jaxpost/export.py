"""From a checkpoint to a Hugging Face folder, which `transformers` and servers built on it open as any other model.

    python -m jaxpost.export --checkpoint=WORKDIR --out=FOLDER

An adapter is merged into its base weights, and quantised weights become floats again; `--adapter` only writes the adapter, in
the `peft` library's format, or each of several as a folder.

    python -m jaxpost.export --checkpoint=WORKDIR --out=FOLDER --pooling=last

writes an embedding model, which sentence-transformers opens: `--pooling` says how it was trained (objectives/contrastive.py).

The folder gets config.json, safetensors, the tokenizer with its chat template, and generation_config.json with the ids that end
an answer, so that a server stops where training taught the model to stop.

`--add` adds tokens to the vocabulary, which a run may then train: `--checkpoint` may be a Hugging Face folder too
(jaxpost/models/vocabulary.py).
"""

import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any

from absl import flags
from etils import epath

from jaxpost import sharding, tokenizer
from jaxpost.adapters import peft
from jaxpost.config import cli
from jaxpost.data.chat import stop_ids
from jaxpost.errors import UserError
from jaxpost.models import adapted, encoder_families, hf, loading, sentences, vocabulary
from jaxpost.objectives import contrastive
from jaxpost.storage import cloud
from jaxpost.types import Params

TEMPERATURE = next(iter(contrastive.leaves(learned=True)))
DTYPES = ("bfloat16", "float16", "float32")


def export(
    checkpoint: str,
    out: str,
    *,
    mesh,
    dtype: str | None = None,
    adapter: bool = False,
    pooling: str | None = None,
    normalise: bool = True,
    tokens: Mapping[str, Any] = types.MappingProxyType({}),
) -> list[str]:
    """Writes the model of a workdir, of one checkpoint in it, or of a Hugging Face folder to `out`; returns the files' names.

    Where a run kept a running mean of the weights, the mean is written. dtype: one of DTYPES; None is config.json's, else
    float32. adapter: whether to write only the adapter. pooling: one of sentences.POOLINGS, for an embedding model;
    normalise: whether its embeddings have length 1. tokens: of tokens to add, what `vocabulary.grown` takes: add, by, multiple,
    special. Raises UserError if `out` is not empty, and for a checkpoint that cannot be read.
    """
    folder = cloud.path(out)
    check_empty(folder, f"--out={out}")
    spec, params = loading.open_model(checkpoint, mesh)
    check_architecture(spec, f"--checkpoint={checkpoint}")
    if pooling is not None:
        spec, params = _embedding_model(spec, params, checkpoint)
    check_leaves(spec, f"--checkpoint={checkpoint}")
    if adapter and spec.transformer.arch.family in encoder_families.FAMILIES:
        raise UserError("--adapter: peft's names of encoders' weights are not written; leave it out, and the folder is whole.")
    if tokens:
        spec, params = _grown(spec, params, mesh, tokens, adapter)
    if adapter:
        base = loading.base_name(spec)
        return peft.save(folder, params, spec.transformer.arch, spec.adapter, base, loading.beside(spec))
    check_merges(spec, f"--checkpoint={checkpoint}")
    if pooling is not None:
        sentences.save(folder, spec.transformer.arch, pooling=pooling, normalise=normalise)
    hf.save(folder, params, spec.transformer.arch, config_of(spec), dtype)
    describe(folder, spec)
    return sorted(p.name for p in folder.iterdir())


def check_empty(folder: epath.Path, place: str) -> None:
    """Raises UserError for a folder that holds something, and for a file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{place}: is a file; give a folder that is new or empty.")
    if folder.exists() and (held := sorted(p.name for p in folder.iterdir())):
        raise UserError(
            f"{place}: is not empty (it holds {held[0]}); nothing is overwritten, give a folder that is new or empty."
        )


def check_architecture(spec: loading.ModelSpec, place: str) -> None:
    """Raises UserError for a model that is no architecture of Hugging Face's."""
    if not hasattr(spec.transformer, "arch"):
        raise UserError(f"{place}: its model is made by {spec.config['name']}; Hugging Face has no format for it.")


def check_leaves(spec: loading.ModelSpec, place: str) -> None:
    """Raises UserError for a model with weights that a Hugging Face folder has no place for."""
    check_architecture(spec, place)
    if spec.leaves:
        raise UserError(
            f"{place}: it has {', '.join(spec.leaves)} besides the model's weights, for which a language "
            "model of Hugging Face has no place; jaxpost.annotate --what=reward uses a reward model as it is."
        )


def check_merges(spec: loading.ModelSpec, place: str) -> None:
    """Raises UserError for an adapter that cannot become part of the weights."""
    if any(adapted.declares(spec.adapter, "one")):
        raise UserError(
            f"{place}: its rows choose among adapters, which no weights can; write them with --adapter, a folder each, and run "
            "or train with one of them."
        )
    if not all(adapted.declares(spec.adapter, "merges")):
        raise UserError(
            f"{place}: what it learned stands before each document and cannot become part of the weights; write it alone, with "
            "--adapter."
        )


def config_of(spec: loading.ModelSpec) -> dict:
    """config.json's fields with the tokenizer's special ids. Those that it already has stay: they do not change the forward,
    and others may rely on them.
    """
    return {**_special_ids(spec.tokenizer), **spec.config}


def describe(folder: epath.Path, spec: loading.ModelSpec) -> None:
    """Writes the tokenizer and generation_config.json, with the ids that end an answer."""
    if spec.tokenizer is not None:
        tokenizer.save(spec.tokenizer, folder)
    ends = spec.ends if spec.tokenizer is None else stop_ids(spec.tokenizer, ends=spec.ends)
    ends = {"eos_token_id": list(ends) if len(ends) > 1 else ends[0]} if ends else {}
    if fields := _special_ids(spec.tokenizer) | spec.generation | ends:
        (folder / "generation_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _embedding_model(spec: loading.ModelSpec, params: Any, checkpoint: str) -> tuple[loading.ModelSpec, Any]:
    """(spec, params) without the temperature that only the loss reads, and with a tokenizer that ends texts."""
    if spec.tokenizer is None:
        raise UserError(f"--checkpoint={checkpoint}: it has no tokenizer, which an embedding model needs.")
    ending = tokenizer.ending(spec.tokenizer, spec.transformer.arch.max_positions)
    leaves = {k: v for k, v in spec.leaves.items() if k != TEMPERATURE}
    params = {k: v for k, v in params.items() if k != TEMPERATURE.partition("/")[0]}
    return dataclasses.replace(spec, tokenizer=ending, leaves=leaves), params


def _grown(spec: loading.ModelSpec, params: Params, mesh, tokens: Mapping, adapter: bool) -> tuple[loading.ModelSpec, Params]:
    """The model with further tokens. Raises UserError where there is no tokenizer, or only an adapter would be written."""
    if adapter or spec.tokenizer is None:
        why = "an adapter has no embedding" if adapter else "the model has no tokenizer"
        raise UserError(f"--add: {why} that tokens could be added to; leave it out.")
    model, params, words, config = vocabulary.grown(spec.transformer, params, spec.tokenizer, spec.config, mesh, **tokens)
    ids = vocabulary.suppressed(spec.suppressed, spec.transformer.vocab, model.vocab, words)
    generation = {k: v for k, v in spec.generation.items() if k != "suppress_tokens"}
    generation |= {"suppress_tokens": list(ids)} if ids else {}
    return dataclasses.replace(spec, transformer=model, tokenizer=words, config=config, generation=generation), params


def _special_ids(text: Any) -> dict[str, int]:
    ids = {} if text is None else {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {k: v for k, v in ids.items() if v is not None}


def main(_) -> None:
    """The command line; see the module's docstring."""
    where, out = cli.required("checkpoint", "out")
    given = flags.FLAGS
    if given.adapter and given.pooling:
        raise UserError("--pooling: an embedding model is whole; leave --adapter out.")
    tokens = {key: given[key].value for key in ("add", "by", "multiple", "special")} if given.add else {}
    if not tokens and (given["by"].present or given["multiple"].present or given.special):
        raise UserError("--by, --multiple and --special are about added tokens; give --add=TOKEN too.")
    options = {"dtype": given.dtype, "adapter": given.adapter, "pooling": given.pooling, "normalise": given.normalise}
    names = export(where, out, mesh=sharding.make_mesh(), tokens=tokens, **options)
    print(f"{out}: {', '.join(names)}")


ABOUT = """Writes a checkpoint as a Hugging Face folder: config.json, safetensors, tokenizer, generation_config.json.

The checkpoint is a workdir of jaxpost.train (its last stage's newest is taken), a stage of it, or one step's folder:

    python -m jaxpost.export --checkpoint=/tmp/quickstart --out=/tmp/arithmetic
    python -m jaxpost.export --checkpoint=/tmp/quickstart/checkpoints/reinforce --out=/tmp/arithmetic --dtype=bfloat16

    python -m jaxpost.export --checkpoint=WORKDIR --out=FOLDER --adapter
    python -m jaxpost.export --checkpoint=FOLDER --out=LARGER --add="<think>" --add="</think>" --by=merged --multiple=64

    python -m jaxpost.export --checkpoint=WORKDIR --out=FOLDER --pooling=last

The folder opens with transformers.AutoModelForCausalLM.from_pretrained, and with jaxpost.generate --model.
"""

if __name__ == "__main__":
    flags.DEFINE_string(
        "checkpoint", None, "A workdir of jaxpost.train, or the folder of a stage or a step under its checkpoints."
    )
    flags.DEFINE_string("out", None, "The folder to write; it must be new or empty.")
    flags.DEFINE_bool("adapter", False, "Write the adapter alone, as peft has it.")
    flags.DEFINE_enum("pooling", None, [*sentences.POOLINGS], "Write an embedding model for sentence-transformers, pooled so.")
    flags.DEFINE_bool("normalise", True, "With --pooling: embeddings have length 1.")
    flags.DEFINE_multi_string("add", [], "A token to add to the vocabulary; for several, give it several times")
    flags.DEFINE_string(
        "by",
        "mean",
        "The rows of added tokens: mean (of all), merged (of the tokens that their text was), a .npy or .npz file.",
    )
    flags.DEFINE_integer("multiple", 1, "With --add: a number that the vocabulary becomes a multiple of.", lower_bound=1)
    flags.DEFINE_bool("special", False, "With --add: decoding for a reader leaves the tokens out.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Number format of the weights (default: what config.json names, else float32).")
    cli.run(main, ABOUT, model=True)
