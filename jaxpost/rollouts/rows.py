"""The rows that a prompt's judged completions give, by the row type that is to be learned from.

    pairs                  the best and the worst of a prompt's completions, the second best and the second worst, and so on,
                           for as long as their rewards differ; the difference is the margin
    labelled, mismatched   every completion, with its reward (0 or 1) for the label
    scored                 every completion, with its reward
    demonstrations         the best one, where it is better than another: rejection sampling

A prompt gives each row once, and the white space around a completion is left out.
"""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from jaxpost.errors import UserError


def rows(kind: str, prompt: str | list, texts: Sequence[str], rewards: Sequence[float]) -> list[dict]:
    """The rows of a prompt's completions, as a data file of this row type has them; see the module's docstring.

    Raises UserError for a reward that is no label where one is needed.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    unique = {json.dumps(row): row for row in ROWS[kind](texts, np.asarray(rewards, float))}
    return [{"prompt": messages, **row} for row in unique.values()]


def _message(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def _pairs(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    order = np.argsort(-rewards, kind="stable")
    for best, worst in zip(order, order[::-1], strict=True):
        if rewards[best] <= rewards[worst]:
            return
        gap = float(rewards[best] - rewards[worst])
        yield {"chosen": _message(texts[best]), "rejected": _message(texts[worst]), "margin": gap}


def _best(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    best = int(np.argmax(rewards)) if len(rewards) else 0
    if len(rewards) and np.ptp(rewards) > 0 and texts[best]:  # an empty answer is nothing to imitate
        yield {"completion": _message(texts[best])}


def _scored(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    for text, reward in zip(texts, rewards, strict=True):
        yield {"completion": _message(text), "score": float(reward)}


def _labelled(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    for text, reward in zip(texts, rewards, strict=True):
        if reward not in (0.0, 1.0):
            raise UserError(f"config.reward: {reward} of {text[:60]!r} is no label; the objective needs a reward of 0 or 1.")
        yield {"completion": _message(text), "label": bool(reward)}


ROWS = {"pairs": _pairs, "demonstrations": _best, "labelled": _labelled, "mismatched": _labelled, "scored": _scored}
