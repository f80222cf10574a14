"""From a checkpoint to a Hugging Face folder, which `transformers` and servers built on it open as any other model.

    python -m jaxpost.export --checkpoint=WORKDIR --out=FOLDER

An adapter is merged into its base weights, and quantised weights become floats again; `--adapter` only writes the adapter, in
the `peft` library's format, or each of several as a folder.

The folder gets config.json, safetensors, the tokenizer with its chat template, and generation_config.json with the ids that end
an answer, so that a server stops where training taught the model to stop.
"""

import json
from typing import Any

from absl import flags

from jaxpost import sharding, tokenizer
from jaxpost.adapters import peft
from jaxpost.config import cli
from jaxpost.data.chat import stop_ids
from jaxpost.errors import UserError
from jaxpost.models import adapted, hf, loading
from jaxpost.storage import cloud

DTYPES = ("bfloat16", "float16", "float32")


def export(checkpoint: str, out: str, *, mesh, dtype: str | None = None, adapter: bool = False) -> list[str]:
    """Writes the model of a workdir, of one checkpoint in it, or of a Hugging Face folder to `out`; returns the files' names.

    Where a run kept a running mean of the weights, the mean is written. dtype: one of DTYPES; None is config.json's, else
    float32. adapter: whether to write only the adapter. Raises UserError if `out` is not empty, and for a checkpoint that
    cannot be read.
    """
    folder = cloud.path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={out}: is a file; give a folder that is new or empty.")
    if folder.exists() and (held := sorted(p.name for p in folder.iterdir())):
        raise UserError(
            f"--out={out}: is not empty (it holds {held[0]}); nothing is overwritten, give a folder that is new or empty."
        )
    spec, params = loading.open_model(checkpoint, mesh)
    if spec.leaves:
        raise UserError(
            f"--checkpoint={checkpoint}: it has {', '.join(spec.leaves)} besides the model's weights, for which a language "
            "model of Hugging Face has no place; jaxpost.annotate --what=reward uses a reward model as it is."
        )
    if adapter:
        base = loading.base_name(spec)
        return peft.save(folder, params, spec.transformer.arch, spec.adapter, base, loading.beside(spec))
    if not all(adapted.declares(spec.adapter, "merges")):
        raise UserError(
            f"--checkpoint={checkpoint}: what it learned stands before each document and cannot become part of the weights; "
            "write it alone, with --adapter."
        )
    special = {} if spec.tokenizer is None else _special_ids(spec.tokenizer)
    # Ids that config.json already has stay: they do not change the forward, and others may rely on them.
    hf.save(folder, params, spec.transformer.arch, {**special, **spec.config}, dtype)
    if spec.tokenizer is not None:
        tokenizer.save(spec.tokenizer, folder)
    ends = spec.ends if spec.tokenizer is None else stop_ids(spec.tokenizer, ends=spec.ends)
    ends = {"eos_token_id": list(ends) if len(ends) > 1 else ends[0]} if ends else {}
    if fields := special | spec.generation | ends:
        (folder / "generation_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return sorted(p.name for p in folder.iterdir())


def _special_ids(text: Any) -> dict[str, int]:
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {k: v for k, v in ids.items() if v is not None}


def main(_) -> None:
    """The command line; see the module's docstring."""
    where, out = cli.required("checkpoint", "out")
    names = export(where, out, mesh=sharding.make_mesh(), dtype=flags.FLAGS.dtype, adapter=flags.FLAGS.adapter)
    print(f"{out}: {', '.join(names)}")


ABOUT = """Writes a checkpoint as a Hugging Face folder: config.json, safetensors, tokenizer, generation_config.json.

The checkpoint is a workdir of jaxpost.train (its last stage's newest is taken), a stage of it, or one step's folder:

    python -m jaxpost.export --checkpoint=/tmp/quickstart --out=/tmp/arithmetic
    python -m jaxpost.export --checkpoint=/tmp/quickstart/checkpoints/reinforce --out=/tmp/arithmetic --dtype=bfloat16

    python -m jaxpost.export --checkpoint=WORKDIR --out=FOLDER --adapter

The folder opens with transformers.AutoModelForCausalLM.from_pretrained, and with jaxpost.generate --model.
"""

if __name__ == "__main__":
    flags.DEFINE_string(
        "checkpoint", None, "A workdir of jaxpost.train, or the folder of a stage or a step under its checkpoints."
    )
    flags.DEFINE_string("out", None, "The folder to write; it must be new or empty.")
    flags.DEFINE_bool("adapter", False, "Write the adapter alone, as peft has it.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Number format of the weights (default: what config.json names, else float32).")
    cli.run(main, ABOUT, model=True)
