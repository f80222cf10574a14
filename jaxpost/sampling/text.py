"""Text to text: prompts are encoded, completed by the model, and decoded.

A prompt is a string, continued as it stands after the beginning-of-text token where the tokenizer adds one on its own; or a
string as a user's message, or a whole conversation, which the chat template renders and opens the assistant's turn after. A
completion ends at the tokenizer's end-of-text token or the chat template's end of turn, which is not shown; or at another id
that the model's folder names as an end, which is shown where it is a word like any other, as `transformers` does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpost import tokenizer
from jaxpost.data.chat import encode_prompt, specials, stop_ids
from jaxpost.errors import UserError
from jaxpost.models import prefix
from jaxpost.models.protocol import Sampled
from jaxpost.sampling.beam import Completed, search
from jaxpost.sampling.decode import Completions, complete
from jaxpost.sampling.processors import About, chain, without
from jaxpost.types import Params

DEFAULT_NEW = 200
# Prompts are padded to a multiple of this, so that prompts of about one length share a compiled program.
_BUCKET = 32


def completed(
    model: Sampled,
    params: Params,
    text: Any,
    prompts: Sequence[str | list[dict] | np.ndarray],
    *,
    mesh,
    new: int | None = None,
    temperature: float = 0.0,
    chat: bool = False,
    template: str | None = None,
    seed: int = 0,
    n: int = 1,
    ends: Sequence[int] = (),
    suppressed: Sequence[int] = (),
    processors: Any = (),
    beams: int | None = None,
    length_penalty: float = 1.0,
    columns: Mapping[str, Sequence[int]] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids of the prompt, ids of its completion without the special token that ended it): `n` of each prompt, side by side.

    text: the tokenizer. prompts: strings, conversations (lists of role and content), or ids. chat: a string is a user's
    message, not text to continue. new: the most tokens a completion may have; None is 200, or as many as the model's positions
    leave room for. temperature: 0 takes the likeliest token. ends: ids that stop a completion besides the tokenizer's and the
    template's; suppressed: ids that none has. template: for `chat`, a name or Jinja; None is the tokenizer's own. processors:
    as `rollouts.processors` names them, or functions. beams: the width of a beam search, which gives the `n` best completions,
    the best first; None samples. length_penalty: see beam.py. columns: as in `decode.stream`. The same seed, prompts and n give
    the same ids. Raises UserError for no or empty prompts, where prompt and `new` exceed the model's positions, for numbers
    that cannot be, and for settings of both a search and a sample.
    """
    _check_search(beams, length_penalty, temperature, n)
    ids = _checked([encoded(text, p, chat, template) for p in prompts], model.vocab, text)
    longest, room = max(map(len, ids)), prefix.max_positions(model, params)
    new = min(DEFAULT_NEW, room - longest) if new is None else new
    if new < 1 or longest + new > room:
        raise UserError(
            f"a prompt of {longest} tokens and {max(new, 1)} new ones do not fit the model's {room} positions "
            f"(max_position_embeddings); {_remedy(room - longest)}"
        )
    stop = stop_ids(text, template, ends)
    about = About(text, tuple(stop), model.vocab, new)
    options = {"mesh": mesh, "prompt_window": min(longest + -longest % _BUCKET, room - new), "new": new, "stop": stop}
    options["chain"] = without(suppressed) + chain(processors, about, "processors")
    options |= {"columns": columns} if columns else {}
    if beams is not None:
        completions = _best(search(model, params, ids, beams=beams, length_penalty=length_penalty, **options), n)
    else:
        completions = complete(model, params, ids, group=n, temperature=temperature, seed=seed, **options)
    return [(ids[i // n], row) for i, row in enumerate(_shown(completions, text))]


def _check_search(beams: int | None, length_penalty: float, temperature: float, n: int) -> None:
    """Raises UserError for numbers that cannot be, and for settings of both a search and a sample."""
    if n < 1 or temperature < 0 or (beams is not None and beams < 1):
        raise UserError(
            f"n={n}, temperature={temperature}, beams={beams}: give n and beams of at least 1 (without beams completions are "
            "drawn), and no temperature below 0."
        )
    if beams and (temperature or n > beams):
        raise UserError(
            f"beams={beams} with temperature={temperature} and n={n}: a search draws nothing and gives `beams` at most."
        )
    if not beams and length_penalty != 1.0:
        raise UserError(f"length_penalty={length_penalty} is of a beam search; give beams too.")


def _checked(ids: list[np.ndarray], vocab: int, text: Any) -> list[np.ndarray]:
    """The prompts. Raises UserError for none, and for an id that the model does not have."""
    if not ids:
        raise UserError("nothing to complete: give at least one prompt.")
    for prompt in ids:
        tokenizer.check_ids(prompt, vocab, text, "a prompt")
    return ids


def _best(completed: Completed, n: int) -> Completions:
    """The `n` best of each prompt. Raises UserError where processors allow fewer."""
    if not np.isfinite(completed.scores[:, :n]).all():
        prompt = int(np.argmin(np.isfinite(completed.scores[:, :n]).all(axis=1)))
        count = int(np.isfinite(completed.scores[prompt]).sum())
        raise UserError(
            f"n={n}: the search has {count} completions of prompt {prompt}, as processors forbid others; ask for fewer."
        )
    tokens, lengths, logps, stopped = (
        x[:, :n].reshape(-1, *x.shape[2:]) for x in (completed.tokens, completed.lengths, completed.logps, completed.stopped)
    )
    return Completions(tokens, lengths, logps, stopped, lengths - stopped)


def _shown(completions: Completions, text: Any) -> list[np.ndarray]:
    """Each completion's ids, without the last one where that ended it and is special."""
    marks = set(specials(text).values())
    rows = zip(completions.tokens, completions.lengths, completions.text_lengths, strict=True)
    return [row[:text] if row[length - 1] in marks else row[:length] for row, length, text in rows]


def _remedy(left: int) -> str:
    return f"set new to {left} or less." if left > 0 else "shorten the prompt."


def encoded(text: Any, prompt: str | list[dict] | np.ndarray, chat: bool = False, template: str | None = None) -> np.ndarray:
    """The ids [n] of a prompt, as `completed` takes it. Raises UserError for an empty one and for one of another kind."""
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 1 or not prompt.size or not np.issubdtype(prompt.dtype, np.integer):
            raise UserError(
                f"a prompt of ids is [n] integers, n at least 1; this one is {prompt.dtype} of shape {prompt.shape}."
            )
        return prompt.astype(np.int32)
    if isinstance(prompt, str) and not chat:
        return _raw(text, prompt)
    strings = isinstance(prompt, list) and all(
        isinstance(t, dict) and all(isinstance(t.get(k), str) for k in ("role", "content")) for t in prompt
    )
    if not isinstance(prompt, str) and (not strings or not prompt or prompt[-1]["role"] == "assistant"):
        raise UserError(
            "a prompt is a string, an array of ids, or a list of {'role', 'content'} that does not end with the assistant, not "
            f"{str(prompt)[:80]}."
        )
    return encode_prompt(prompt, text, template)


def _raw(text: Any, prompt: str) -> np.ndarray:
    """A prompt's ids, after the beginning-of-text token where the tokenizer adds one and the prompt does not spell it out."""
    ids = tokenizer.encode(text, prompt)
    first = tokenizer.opening(text)
    ids = ids if ids[:1] == first else first + ids
    if not ids:
        raise UserError("the prompt is empty, and the tokenizer has no beginning-of-text token to start from; give some text.")
    return np.array(ids, np.int32)


def continuation(text: Any, prompt: np.ndarray, completion: np.ndarray) -> str:
    """The completion as the text it adds to the prompt's: decoded alone it would lose its leading space in some tokenizers."""
    before, whole, alone = (
        text.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        for ids in (prompt, np.concatenate([prompt, completion]), completion)
    )
    return whole.removeprefix(before) if whole.startswith(before) else alone
