"""Stories under constraints: go on with a story, use three given words again, and come to an end with a full stop.

The model that this is for knows nothing but children's stories (TinyStories) and has seen no instruction ever, so there is none
in a prompt. A prompt is the story's opening, which holds the three words where such stories hold them:

    Once upon a time, there was a happy cat. One day, the cat saw a boat.

The completion has to use "happy", "cat" and "boat" by itself, each as a whole word, in any order. Asked like this, a model of
260 thousand weights uses a third of the words of its own accord, where "Words: cat, boat, happy." brings it below a tenth: it
goes on from stories, not from lists. Of a hundred stories two or three have all of them in 96 tokens, and next to none comes to
an end by then; that is what reinforcement is to teach it. (The third word is a thing, not what the animal did: in the past
tense such a model says a verb again in one story of fifty, which is too few to learn from within minutes.)

A base model has no chat format: its texts begin, and so also end, with the beginning-of-text token. In a recipe that is

    template="{{ bos_token }}{% for m in messages %}{{ m.content }}{{ bos_token if m.role == 'assistant' }}{% endfor %}"

from which the stop tokens follow as from any template. `reward` is shaped: of the three words and the full stop, the share
that is there, so that every one of them is worth a step. `satisfied` is the verdict, all or nothing, that evaluation is about.
"Ends" is meant of a story that ended, so the full stop counts only where a stop token came after it: where a record says under
`stopped` that none did, the text merely stood at a full stop when it was cut off. Without that key it is taken as ended.

A word is one of twenty animals and people, twenty things or twenty adjectives, and a problem one of each: 8,000, of which a
hash of the three words holds out about one in ten for testing. Each word is there in training; its company is new.
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
    (as rewards.instructions reads them), and, for a reader, the words once more as the answer.

    Problems repeat, as draws do. Raises UserError on an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r}: stories has the splits {' and '.join(SPLITS)}")
    problems = _problems()[split]
    return _record(problems[hashed("stories", seed, split, index) % len(problems)])


def test_records(per_cell, *, seed=0):
    """`per_cell` different test problems, or all if there are fewer, in an order fixed by `seed`; more of them extend the list.

    Raises UserError when it is below 1.
    """
    if per_cell < 1:
        raise UserError(f"per_cell={per_cell}: at least one test problem is needed")
    problems = _problems()["test"]
    # RandomState, since NumPy promises its stream for good; a Generator's may change between releases.
    order = np.random.RandomState(hashed("stories", "test", seed) % 2**32).permutation(len(problems))
    return [_record(problems[place]) for place in order[:per_cell]]


# Its name looks like a test to pytest when a test file imports it.
test_records.__test__ = False


def reward(record, completion) -> float:
    """The share of the three words and the full stop that a completion has: 0, 1/4, ... 1. See above for `stopped`."""
    return instructions.follows(record, _told(record, completion))


def satisfied(record, completion) -> bool:
    """Whether a completion has all three words and the full stop. See above for `stopped`."""
    return bool(instructions.follows(record, _told(record, completion), strict=True))


def _told(record, completion):
    """The completion as it is to be judged: one that was cut off goes on, and has no full stop for its last character."""
    return completion if record.get("stopped", True) else completion + "\u2026"


@functools.cache
def _problems() -> dict[str, list[tuple[str, str, str]]]:
    """The three words of every problem, by split."""
    found = {name: [] for name in SPLITS}
    for words in itertools.product(ANIMALS, THINGS, ADJECTIVES):
        found["test" if hashed("stories", *words) % 10 == 0 else "train"].append(words)
    return found


def _record(words: tuple[str, str, str]) -> dict:
    animal, thing, adjective = words
    return {
        "prompt": f"Once upon a time, there was a {adjective} {animal}. One day, the {animal} saw a {thing}.",
        "answer": ", ".join(words),
        "words": list(words),
        "constraints": [*({"kind": "includes", "words": [word]} for word in words), {"kind": "full_stop"}],
    }
