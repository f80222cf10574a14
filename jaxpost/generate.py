"""Text from a model: prompts in, completions out.

    python -m jaxpost.generate --model=FOLDER --prompt="Once upon a time"

The model is a Hugging Face folder, a workdir of jaxpost.train, or one checkpoint inside a workdir. A prompt is continued as it
stands, after the beginning-of-text token where the tokenizer adds one on its own; with `chat` it is a user's message, and the
completion the assistant's turn. Either ends at the tokenizer's end-of-text token or the chat template's end of turn, which is
not shown.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from jaxpost import cli, sharding, tokenizer
from jaxpost.data.chat import encode_prompt, stop_ids
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.models.transformer import Transformer
from jaxpost.sampling.decode import complete
from jaxpost.types import Params

DEFAULT_NEW = 200
# Prompts are padded to a multiple of this, so that prompts of about one length share a compiled program.
_BUCKET = 32


def generate(
    model: Transformer,
    params: Params,
    text: Any,
    prompts: Sequence[str],
    *,
    mesh,
    new: int | None = None,
    temperature: float = 0.0,
    chat: bool = False,
    template: str | None = None,
    seed: int = 0,
    n: int = 1,
) -> list[str]:
    """`n` completions of each prompt, those of one prompt side by side: len(prompts) * n strings.

    text: the tokenizer. new: the most tokens a completion may have; None is 200, or as many as the model's positions leave room
    for. temperature: 0 takes the likeliest token. template: for `chat`, a name or Jinja; None is the tokenizer's own. The same
    seed, prompts and n give the same text. Raises UserError for no or empty prompts, and where prompt and `new` exceed the
    model's positions.
    """
    ids = [
        encode_prompt([{"role": "user", "content": p}], text, template) if chat else _raw(text, p)
        for p in prompts
        for _ in range(n)
    ]
    if not ids:
        raise UserError("nothing to complete: give at least one prompt.")
    longest, room = max(map(len, ids)), model.arch.max_positions
    new = min(DEFAULT_NEW, room - longest) if new is None else new
    if new < 1 or longest + new > room:
        raise UserError(
            f"a prompt of {longest} tokens and {max(new, 1)} new ones do not fit the model's {room} positions "
            f"(max_position_embeddings); {_remedy(room - longest)}"
        )
    found = complete(
        model,
        params,
        ids,
        mesh=mesh,
        prompt_window=min(longest + -longest % _BUCKET, room - new),
        new=new,
        stop=stop_ids(text, template),
        temperature=temperature,
        seed=seed,
    )
    ends = found.lengths - found.stopped
    return [_continuation(text, p, row[len(p) : len(p) + end]) for p, row, end in zip(ids, found.tokens, ends, strict=True)]


def _remedy(left: int) -> str:
    return f"set new to {left} or less." if left > 0 else "shorten the prompt."


def _raw(text: Any, prompt: str) -> np.ndarray:
    """A prompt's ids, after the beginning-of-text token where the tokenizer adds one and the prompt does not spell it out."""
    ids = tokenizer.encode(text, prompt)
    opening = text("")["input_ids"][:1]
    if opening == [text.bos_token_id] and ids[:1] != opening:
        ids = opening + ids
    if not ids:
        raise UserError("the prompt is empty, and the tokenizer has no beginning-of-text token to start from; give some text.")
    return np.array(ids, np.int32)


def _continuation(text: Any, prompt: np.ndarray, completion: np.ndarray) -> str:
    """The completion as the text it adds to the prompt's: decoded alone it would lose its leading space in some tokenizers."""
    before, whole = (
        text.decode(ids.tolist(), clean_up_tokenization_spaces=False) for ids in (prompt, np.concatenate([prompt, completion]))
    )
    return whole.removeprefix(before) if whole.startswith(before) else text.decode(completion.tolist())


def main(_) -> None:
    """The command line; see the module's docstring."""
    given = flags.FLAGS
    where, prompts = cli.required("model", "prompt")
    mesh = sharding.make_mesh()
    found, params = loading.open_model(where, mesh, given.dtype)
    if found.tokenizer is None:
        raise UserError(
            f"--model={where}: the folder has no tokenizer (tokenizer.json), so there is no way from text to tokens."
        )
    options = {k: given[k].value for k in ("new", "temperature", "chat", "seed", "n")}
    texts = generate(found.transformer, params, found.tokenizer, prompts, mesh=mesh, **options)
    for i, completion in enumerate(texts):
        prompt = prompts[i // given.n]
        if given.json:
            print(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False))
            continue
        if len(texts) > 1:
            print(f"--- {prompt}")
        print(completion)


ABOUT = """Completes prompts with a model.

The model is a Hugging Face folder, a workdir of jaxpost.train, or one checkpoint in it:

    python -m jaxpost.generate --model=FOLDER --prompt="Once upon a time"
    python -m jaxpost.generate --model=/tmp/quickstart --chat --prompt="12+34" --prompt="7x8"
    python -m jaxpost.generate --model=/tmp/quickstart/checkpoints/sft --chat --prompt="12+34" --temperature=1 --n=4 --json
"""

if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "Folder of the model: Hugging Face's, a workdir of jaxpost.train, or a checkpoint in one."
    )
    flags.DEFINE_multi_string("prompt", [], "Text to complete; for several, give it several times")
    flags.DEFINE_integer("new", None, "The most tokens to add (default: 200, or what the model has room for).", lower_bound=1)
    flags.DEFINE_float(
        "temperature", 0.0, "0 takes the likeliest token each time, 1 samples as the model says.", lower_bound=0.0
    )
    flags.DEFINE_bool(
        "chat", False, "The prompt is a user's message: apply the chat template, and print the assistant's answer."
    )
    flags.DEFINE_integer("seed", 0, "Which random numbers to sample with.", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_integer("n", 1, "How many completions of each prompt.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", sorted(loading.DTYPES), "The computation's number format.")
    flags.DEFINE_bool("json", False, "Print one JSON object a completion, with the keys prompt and completion.")
    cli.run(main, ABOUT)
