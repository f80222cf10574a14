"""Rewards on a completion's length and repetition.

Lengths are in words, since a reward sees no tokens. For a limit on tokens see the rollouts' step `overlong`.
"""

import math
from collections.abc import Mapping

from jaxpost.config.resolve import resolve
from jaxpost.errors import UserError


def length(record: dict, completion: str, *, at_least: int = 0, at_most: float = math.inf, slack: int = 0) -> float:
    """1 for a completion of at_least to at_most words, falling linearly to 0 at slack + 1 words too many or too few."""
    if not 0 <= at_least <= at_most or slack < 0:
        raise UserError(f"rewards.text.length: at_least={at_least}, at_most={at_most}, slack={slack} leave no length.")
    count = len(completion.split())
    beyond = max(at_least - count, count - at_most, 0)
    return 1.0 if beyond == 0 else max(0.0, 1.0 - beyond / (slack + 1))


def repetition(record: dict, completion: str, *, ngram_size: int = 3, max_penalty: float = -1.0) -> float:
    """max_penalty times the share of n-grams that repeat an earlier one: 0 without repetition.

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
    """A cosine in the length: a right answer scores higher the shorter it is, a wrong one lower:

        R = a + (b - a) (1 + cos(pi min(words / max_len, 1))) / 2,   from b for no words to a for max_len

    with a, b = min_value_correct, max_value_correct for a right answer, max_value_wrong, min_value_wrong for a wrong one. An
    answer is right if the reward `correct` gives more than 0.5; None if that gives None. Names and defaults are TRL's, where
    lengths are in tokens. Source: "Demystifying Long Chain-of-Thought Reasoning in LLMs", appendix C.1.
    """
    if max_len < 1:
        raise UserError(f"rewards.text.cosine: max_len={max_len} words; give 1 at least.")
    score = resolve(correct, "rewards")(record, completion)
    if score is None:
        return None
    long, short = (min_value_correct, max_value_correct) if score > 0.5 else (max_value_wrong, min_value_wrong)
    share = min(len(completion.split()) / max_len, 1.0)
    return long + (short - long) * (1 + math.cos(math.pi * share)) / 2
