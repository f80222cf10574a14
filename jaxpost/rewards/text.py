"""What can be said of a completion as text: how long it is, and how much of it was there before.

Lengths are in words, since a reward sees no tokens; a limit on tokens is the rollouts' own (`overlong`).
"""

import math
from collections.abc import Mapping

from jaxpost.config.resolve import resolve
from jaxpost.errors import UserError


def length(record: dict, completion: str, *, at_least: int = 0, at_most: float = math.inf, slack: int = 0) -> float:
    """1 for a completion of at_least to at_most words; outside it falls on a straight line, to 0 at slack + 1 words too many or
    too few.
    """
    if not 0 <= at_least <= at_most or slack < 0:
        raise UserError(f"rewards.text.length: at_least={at_least}, at_most={at_most}, slack={slack} leave no length.")
    count = len(completion.split())
    beyond = max(at_least - count, count - at_most, 0)
    return 1.0 if beyond == 0 else max(0.0, 1.0 - beyond / (slack + 1))


def repetition(record: dict, completion: str, *, ngram_size: int = 3, max_penalty: float = -1.0) -> float:
    """max_penalty times the share of n-grams that are there already: 0 where none is said twice.

    The n-grams are of words in lower case, where TRL takes tokens. Source: "Demystifying Long Chain-of-Thought Reasoning in
    LLMs", appendix C.2.
    """
    if ngram_size < 1 or max_penalty > 0:
        raise UserError(f"rewards.text.repetition: ngram_size={ngram_size} must be positive, max_penalty={max_penalty} not.")
    words = completion.lower().split()
    ngrams = list(zip(*(words[i:] for i in range(ngram_size)), strict=False))
    return max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0


def cosine(
    record: dict,
    completion: str,
    *,
    max_len: int,
    correct: str | Mapping = "math.numeric",
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> float | None:
    """A right answer is worth the more the shorter it is, a wrong one the less, along half a cosine:

        R = a + (b - a) (1 + cos(pi min(words / max_len, 1))) / 2,   from b for no words to a for max_len

    with a, b = min_value_correct, max_value_correct of a right answer, max_value_wrong, min_value_wrong of a wrong one. What is
    right a reward says, more than a half; where that has no say (None), neither has this. Names and values are TRL's, where
    lengths are in tokens. Source: "Demystifying Long Chain-of-Thought Reasoning in LLMs", appendix C.1.
    """
    if max_len < 1:
        raise UserError(f"rewards.text.cosine: max_len={max_len} words; give 1 at least.")
    verdict = resolve(correct, "rewards")(record, completion)
    if verdict is None:
        return None
    long, short = (min_value_correct, max_value_correct) if verdict > 0.5 else (max_value_wrong, min_value_wrong)
    share = min(len(completion.split()) / max_len, 1.0)
    return long + (short - long) * (1 + math.cos(math.pi * share)) / 2
