"""Rows of parts, which are tokenised apart and learned or not:

    {"parts": [{"text": "Great film! It was"}, {"text": " good", "learn": true}]}

Everywhere else a text is tokenised as one string, so that no token is there that the text would not have. Parts keep their
own tokens, whatever stands beside them: options behind one prompt then have the same prompt, and demonstrations the tokens
that they have alone. A tokenizer that puts a space before each text (SentencePiece's) does so before each part.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxpost.errors import UserError
from jaxpost.tokenizer import encode as encoded_text
from jaxpost.tokenizer import opening


class Parts(NamedTuple):
    """texts, and whether each is learned."""

    texts: tuple[str, ...]
    learned: tuple[bool, ...]
    place: str


def of(row: dict[str, Any], place: str) -> Parts:
    """The parts of a row. Raises UserError for what are none."""
    parts = row["parts"]
    if not isinstance(parts, list) or not parts:
        raise UserError(f"{place}: parts must be a list of objects such as {{'text': 'a', 'learn': true}}; write it so")
    for number, part in enumerate(parts, start=1):
        fault = ""
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or not part["text"]:
            fault = "has no text"
        elif not isinstance(part.get("learn", False), bool):
            fault = f"has learn={part['learn']!r}, which is neither true nor false"
        elif unknown := part.keys() - {"text", "learn"}:
            fault = f"has a key {min(unknown)!r}, which nothing reads"
        if fault:
            raise UserError(f"{place}, part {number}: {fault}; a part is an object such as {{'text': 'a', 'learn': true}}")
    return Parts(tuple(part["text"] for part in parts), tuple(part.get("learn", False) for part in parts), place)


def encode(parts: Parts, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """tokens [n] int32, mask [n] bool: the beginning-of-text token where the tokenizer adds one, the parts one after the other,
    and the end-of-text token, which is learned if the last part is. Raises UserError for a tokenizer without one.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"{parts.place}: the tokenizer has no eos_token, so a model would never learn to stop; give it one")
    try:
        each = [(encoded_text(tokenizer, text), learn) for text, learn in zip(parts.texts, parts.learned, strict=True)]
    except UserError as error:
        raise UserError(f"{parts.place}: {error}") from error
    first = opening(tokenizer)
    if each[0][0][: len(first)] != first:  # a text may spell out the special tokens itself
        each.insert(0, (first, False))
    if each[-1][0][-1:] != [tokenizer.eos_token_id]:
        each.append(([tokenizer.eos_token_id], parts.learned[-1]))
    tokens = np.array([token for ids, _ in each for token in ids], np.int32)
    return tokens, np.array([learn for ids, learn in each for _ in ids], bool)
