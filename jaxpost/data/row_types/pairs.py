"""Pairs: a prompt with a chosen and a rejected answer, the odd and the even segments of a row; margins where they are read."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxpost.data import examples, formats, messages
from jaxpost.data.examples import Example, Row, Settings
from jaxpost.data.readers import Record
from jaxpost.errors import UserError

completions = 2
shareable = True


def columns(reads: frozenset[str]) -> Mapping[str, str]:
    """How much better the chosen answer is, the same at each token of the pair."""
    return {"margins": "float32"} if "margins" in reads else {}


def encode(record: Record, settings: Settings) -> Example:
    """The pair of a record; its value is the margin, NaN where there is none. Raises UserError where one is read."""
    pair = formats.pair(record, settings.columns)
    if pair.margin is None and "margins" in settings.reads:
        raise UserError(f"{pair.place}: the objective reads margins, and there is no number under margin; give one")
    answers = (("chosen", pair.chosen_messages), ("rejected", pair.rejected_messages))
    documents = [
        examples.answered(pair.prompt_messages, answer, settings, f"{pair.place}, {name}", pair.tools)
        for name, answer in answers
    ]
    return examples.of(documents, [np.nan if pair.margin is None else pair.margin])


def lay_out(example: Example, settings: Settings) -> Row:
    """The columns of both documents."""
    row = examples.lay_out(example, settings)
    return row | {name: np.full(len(row["tokens"]), example.values[0]) for name in columns(settings.reads)}


def rows_of(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    """The best and the worst completion, the second best and the second worst, and so on, while their rewards differ."""
    order = np.argsort(-rewards, kind="stable")
    for best, worst in zip(order, order[::-1], strict=True):
        if rewards[best] <= rewards[worst]:
            return
        chosen, rejected = (messages.assistant(texts[i]) for i in (best, worst))
        yield {"chosen": chosen, "rejected": rejected, "margin": float(rewards[best] - rewards[worst])}
