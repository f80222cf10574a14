"""Demonstrations: one document a row, learned by imitation: conversations, prompts with completions, plain texts."""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxpost.data import chat, formats, messages
from jaxpost.data.examples import Example, Row, Settings
from jaxpost.data.readers import Record
from jaxpost.errors import UserError

completions = 1
fills_window = True
_NO_PROMPT = np.zeros(0, np.int32)


def check(settings: Settings) -> None:
    """Every setting means something here."""


def encode(record: Record, settings: Settings) -> Example:
    """The document that a record holds, whatever its length. Raises UserError where nothing of it is learned."""
    document = formats.demonstration(record, settings.columns)
    encoded = chat.encode(document, settings.tokenizer, settings.template, settings.train_on)
    if not encoded["mask"].any():
        remedy = f"check train_on={settings.train_on!r} and the template"
        if isinstance(document, formats.Conversation) and document.untrained:
            remedy = "every answer of it is marked as not to be learned (as by weight 0), so remove the row or a mark"
        raise UserError(f"{record.place}: no token of it is trained on; {remedy}")
    return Example(_NO_PROMPT, (encoded["tokens"],), (encoded["mask"],))


def fit(example: Example, settings: Settings, place: str) -> list[Example]:
    """The example made to fit the window: itself, pieces of it, or [] if it is dropped.

    `too_long` says what becomes of a longer one: "error"; "truncate" keeps its first tokens; "split" keeps all of them, in
    pieces that know nothing of each other, as is usual for documents; "drop". A piece of which nothing is trained on is left
    out, and a piece's first token never is. Raises UserError for "error", with place, length, window and remedy.
    """
    (tokens,), (mask,), window = example.answers, example.masks, settings.window
    length = len(tokens)
    if length <= window:
        return [example]
    if settings.too_long == "drop":
        return []
    if settings.too_long in ("truncate", "split"):
        starts = range(0, length, window) if settings.too_long == "split" else [0]
        learned = mask & (np.arange(length) % window > 0)
        pieces = [Example(_NO_PROMPT, (tokens[s : s + window],), (learned[s : s + window],)) for s in starts]
        return [piece for piece in pieces if piece.masks[0].any()]
    raise UserError(
        f"{place}: the example has {length} tokens and the window {window}; make the window {length} or longer, or say"
        ' too_long="truncate", "split" or "drop"'
    )


def lay_out(example: Example, settings: Settings) -> Row:
    """{tokens, mask}: [n]."""
    return {"tokens": example.answers[0], "mask": example.masks[0]}


def rows_of(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    """The best completion, where it is better than another: rejection sampling."""
    best = int(np.argmax(rewards)) if len(rewards) else 0
    if len(rewards) and np.ptp(rewards) > 0 and texts[best]:  # nobody is taught to say nothing
        yield {"completion": messages.assistant(texts[best])}
