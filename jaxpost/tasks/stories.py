"""Stories under constraints: continue a story, use three words of its opening again, and end with a full stop.

The task is for a model that has only read children's stories (TinyStories) and never an instruction, so prompts have none. A
prompt is the opening of a story, which contains the three words:

    Once upon a time, there was a happy cat. One day, the cat saw a boat.

The completion has to contain "happy", "cat" and "boat", each as a whole word, in any order. With this prompt a model of 260
thousand weights uses a third of the words before training; with "Words: cat, boat, happy." it uses less than a tenth, since it
continues stories, not lists. Two or three stories in a hundred have all of them in 96 tokens, and hardly any ends by then.
Reinforcement has to teach both. (The third word is a thing and not a verb: the model repeats a verb in one story of fifty,
which is too rare to learn from within minutes.)

A base model has no chat format: its texts begin and end with the beginning-of-text token. In a recipe that is

    template="{{ bos_token }}{% for m in messages %}{{ m.content }}{{ bos_token if m.role == 'assistant' }}{% endfor %}"

and the stop tokens follow from the template. `reward` is the share of the three words and the full stop that the completion
has, so that each earns a reward. `satisfied` is all or nothing, for evaluation. The full stop counts only if a stop token
follows it: a record's `stopped` is false if the text was cut off at its last token. Without that key the text counts as ended.

A problem has one of twenty animals and people, one of twenty things and one of twenty adjectives: 8,000 problems. A hash of the
three words holds out about one in ten for testing: each word occurs in training, its combination does not.
"""

import functools
import itertools

import numpy as np

from jaxpost.errors import UserError
from jaxpost.rewards import instructions
from jaxpost.tasks.arithmetic import SPLITS, hashed

_WORDS = (
    "bear bee bird boy cat cow dad dog doll duck fish fox girl horse king kitten lion mom mouse pig",
    "bag ball bed bike boat book box cake car cookie cup flower hat kite leaf rock stick toy tree truck",
    "bad big brave fat funny good green happy kind little loud new nice red sad shy small soft tiny warm",
)
ANIMALS, THINGS, ADJECTIVES = (tuple(words.split()) for words in _WORDS)


def record(index, *, split="train", seed=0):
    """Problem number `index` of an endless stream: a dict with prompt, words (an animal, a thing, an adjective), constraints
    (for rewards.instructions), and the words again as the answer, for display.

    Problems may repeat. Raises UserError for an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r}: stories has the splits {' and '.join(SPLITS)}")
    problems = _problems()[split]
    return _record(problems[hashed("stories", seed, split, index) % len(problems)])


def test_records(per_cell, *, seed=0):
    """`per_cell` different test problems, or all if there are fewer, in an order by `seed`. A larger one extends the list.

    Raises UserError if it is below 1.
    """
    if per_cell < 1:
        raise UserError(f"per_cell={per_cell}: at least one test problem is needed")
    problems = _problems()["test"]
    # RandomState, since NumPy guarantees its stream; a Generator's may change between releases.
    order = np.random.RandomState(hashed("stories", "test", seed) % 2**32).permutation(len(problems))
    return [_record(problems[place]) for place in order[:per_cell]]


# Its name looks like a test to pytest when a test file imports it.
test_records.__test__ = False


def reward(record, completion) -> float:
    """The share of the three words and the full stop that a completion has: 0, 1/4, ... 1. See above for `stopped`."""
    return instructions.follows(record, _judged_text(record, completion))


def satisfied(record, completion) -> bool:
    """Whether a completion has all three words and the full stop. See above for `stopped`."""
    return bool(instructions.follows(record, _judged_text(record, completion), strict=True))


def _judged_text(record, completion):
    """The completion, with an ellipsis if it was cut off, so that it does not end in a full stop."""
    return completion if record.get("stopped", True) else completion + "\u2026"


@functools.cache
def _problems() -> dict[str, list[tuple[str, str, str]]]:
    """The three words of every problem, by split."""
    problems = {name: [] for name in SPLITS}
    for words in itertools.product(ANIMALS, THINGS, ADJECTIVES):
        problems["test" if hashed("stories", *words) % 10 == 0 else "train"].append(words)
    return problems


def _record(words: tuple[str, str, str]) -> dict:
    animal, thing, adjective = words
    return {
        "prompt": f"Once upon a time, there was a {adjective} {animal}. One day, the {animal} saw a {thing}.",
        "answer": ", ".join(words),
        "words": list(words),
        "constraints": [*({"kind": "includes", "words": [word]} for word in words), {"kind": "full_stop"}],
    }
