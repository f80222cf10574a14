"""An example: the documents that lie in a row together, whatever the row type; what all row types share.

An example is a prompt and its answers. Each answer is rendered behind the prompt and tokenised as one string, as every
conversation is here, so no token is there that the text would not have. The example's prompt is what its documents begin with
in common, up to the first token that is learned. Where an answer's first letters change the last tokens of the prompt, those
tokens count as the answer's: all answers condition on the same ids, and no letter is lost at the seam.

The documents of an example follow each other; or, with a shared prefix, the prompt is there once, without its last token, and
each answer is a branch that begins with a copy of that token, so that the hidden state before a token still predicts it:

    tokens     p1 p2 p3  a1 a2   p1 p2 p3  b1          p1 p2  p3 a1 a2  p3 b1
    segments    1  1  1   1  1    2  2  2   2           1  1   1  1  1   2  2
    positions   0  1  2   3  4    0  1  2   3           0  1   2  3  4   2  3
    branches                                            0  0   1  1  1   2  2
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.data import chat, formats
from jaxpost.errors import UserError

Row = dict[str, np.ndarray]
_NONE = np.zeros(0, np.int32)
_TRAIN_ON = ("assistant", "completion", "last")


class Example(NamedTuple):
    """prompt [p] int32; each answer's tokens [a] int32 and mask [a] bool; values [v]: numbers whose meaning is the row type's,
    such as a label, or a number a token.
    """

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    values: Sequence[float] | np.ndarray = ()


class Settings(NamedTuple):
    """How rows become examples: see `encoding.encode_all`. template: Jinja; reads: the columns that the objective reads."""

    tokenizer: Any
    template: str | None
    train_on: str
    window: int
    longest: int
    too_long: str
    columns: Mapping[str, str]
    shared: bool
    reads: frozenset[str]


def check(settings: Settings) -> None:
    """Raises UserError for settings that mean nothing for a prompt with answers."""
    if settings.train_on not in _TRAIN_ON:
        choices = ", ".join(_TRAIN_ON)
        raise UserError(
            f"config.train_on: {settings.train_on!r} of a prompt with judged answers; what is learned is one of {choices}"
        )
    if settings.too_long == "split":
        raise UserError('too_long="split": pieces of a judged answer cannot be judged; choose error, truncate or drop')


def answered(prompt: str | list, answer: str | list, settings: Settings, place: str, tools: list | None = None) -> dict:
    """The document {tokens [n] int32, mask [n] bool, start} of a prompt with an answer, which begins at the token `start`.

    Both are text or a list of messages. The assistant's turns of the answer are learned, stop tokens included. Raises UserError
    with the place where nothing is, and for what is neither text nor messages.
    """
    before = formats.turns_or(prompt, "prompt", place, "user")
    after = formats.turns_or(answer, "answer", place, "assistant")
    conversation = formats.conversation([*before, *after], place, len(before), tools)
    tokenizer, template = settings.tokenizer, settings.template
    whole = chat.encode(conversation, tokenizer, template, "completion")
    learned = whole if settings.train_on != "last" else chat.encode(conversation, tokenizer, template, "last")
    if not learned["mask"].any():
        raise UserError(f"{place}: every turn of the answer is marked as not to be learned; remove the row or a mark")
    if conversation.untrained:  # the answer begins at its first turn, learned or not
        whole = chat.encode(conversation._replace(untrained=()), tokenizer, template, "completion")
    return learned | {"start": int(np.argmax(whole["mask"]))}


def of(documents: Sequence[Mapping], values: Sequence[float] | np.ndarray = ()) -> Example:
    """The example of documents as `answered` gives them; what they begin with in common becomes its prompt."""
    first = documents[0]["tokens"]
    size = min(document["start"] for document in documents)
    for document in documents[1:]:
        size = min(size, _common(first, document["tokens"]))
    masks = []
    for document in documents:
        mask = document["mask"].copy()
        # Tokens of the prompt that an answer changed are the answer's, but for a document's first, which nothing precedes.
        mask[max(size, 1) : document["start"]] = True
        masks.append(mask[size:])
    return Example(first[:size], tuple(document["tokens"][size:] for document in documents), tuple(masks), values)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def learned(example: Example) -> int:
    """How many tokens are learned of all answers."""
    return sum(int(mask.sum()) for mask in example.masks)


def length(prompt: int, answers: Sequence[int], shared: bool) -> int:
    """The tokens of an example in its row, of its prompt's and its answers' lengths."""
    return max(prompt - 1, 0) + sum(min(prompt, 1) + n for n in answers) if shared else sum(prompt + n for n in answers)


def needed(example: Example, too_long: str, shared: bool) -> int:
    """The least window that makes the example useful: up to each answer's first learned token where it is cut, else all."""
    ends = [int(np.argmax(mask)) + 1 for mask in example.masks] if too_long == "truncate" else map(len, example.answers)
    return length(len(example.prompt), list(ends), shared)


def fit(example: Example, settings: Settings, place: str) -> list[Example]:
    """[the example], made to fit the window, and each of its documents the model (`longest`); [] if it is dropped.

    too_long: "error"; "drop"; "truncate" cuts the ends of the answers, the longer ones first, and never the prompt. What is cut
    loses its stop token. An example of which an answer then has nothing to learn, or whose answers are equal, is dropped.
    """
    size, lengths = len(example.prompt), [len(answer) for answer in example.answers]
    whole, (window, longest) = length(size, lengths, settings.shared), (settings.window, settings.longest)
    if whole <= window and size + max(lengths) <= longest:
        return [example]
    if settings.too_long == "drop":
        return []
    if settings.too_long == "error":
        remedy = 'or say too_long="truncate" (answers are cut, never the prompt) or "drop"'
        if size + max(lengths) > longest < window:  # a longer window would not help
            raise UserError(f"{place}: a document of {size + max(lengths)} tokens, and the model takes {longest}; {remedy[3:]}")
        what = {1: "the prompt and its answer have", 2: "the prompt with both answers has"}.get(len(lengths))
        what = what or f"the prompt with its {len(lengths)} answers has"
        raise UserError(f"{place}: {what} {whole} tokens and the window {window}; make the window {whole} or longer, {remedy}")
    cut = _cut(example, settings)
    return [] if _all_equal(cut.answers) or not all(mask.any() for mask in cut.masks) else [cut]


def _cut(example: Example, settings: Settings) -> Example:
    """The example with its answers cut, the longest first, until they fit."""
    size, lengths = len(example.prompt), [len(answer) for answer in example.answers]
    room, most = settings.window - length(size, [0] * len(lengths), settings.shared), max(lengths)
    for rank, n in enumerate(sorted(lengths)):
        if n * (len(lengths) - rank) > room:  # this one and the longer ones share what the shorter ones left
            most = room // (len(lengths) - rank)
            break
        room -= n
    kept = max(0, min(most, settings.longest - size))
    return example._replace(answers=tuple(x[:kept] for x in example.answers), masks=tuple(x[:kept] for x in example.masks))


def _all_equal(answers: Sequence[np.ndarray]) -> bool:
    return len(answers) > 1 and all(np.array_equal(answers[0], other) for other in answers[1:])


def equal_once_cut(example: Example, settings: Settings) -> bool:
    """Whether the answers, cut to fit, are there and the same: nothing is left to compare."""
    answers = _cut(example, settings).answers
    return len(answers[0]) > 0 and _all_equal(answers)


def lay_out(example: Example, settings: Settings) -> Row:
    """The example as columns [n] of its row: tokens, mask, segments, positions; with a shared prefix `branches`."""
    size, parts = len(example.prompt), []
    kept = max(size - 1, 0) if settings.shared else 0
    if settings.shared:
        parts.append(_part(example.prompt[:kept], np.zeros(kept, bool), 1, 0, 0))
    for number, (answer, mask) in enumerate(zip(example.answers, example.masks, strict=True), start=1):
        tokens = np.concatenate([example.prompt[kept:], answer])
        parts.append(_part(tokens, np.concatenate([np.zeros(size - kept, bool), mask]), number, kept, number))
    row = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not settings.shared:
        del row["branches"]
    return row


def _part(tokens: np.ndarray, mask: np.ndarray, segment: int, position: int, branch: int) -> Row:
    n = len(tokens)
    return {
        "tokens": tokens,
        "mask": mask,
        "segments": np.full(n, segment, np.int32),
        "positions": np.arange(position, position + n, dtype=np.int32),
        "branches": np.full(n, branch, np.int32),
    }


def documents(row: Row) -> list[Row]:
    """The {tokens, mask} of each document of an example's columns, whatever its layout: what there is to be shown of it."""
    if "segments" not in row:
        return [row]
    numbers = range(1, int(row["segments"].max()) + 1)
    prompt = row["branches"] == 0 if "branches" in row else np.zeros(len(row["tokens"]), bool)
    return [{k: row[k][prompt | (row["segments"] == number)] for k in ("tokens", "mask")} for number in numbers]


def stored(examples: Sequence[Example]) -> Row:
    """N examples as flat arrays: tokens int32 and mask bool of all; values float32 of all; sizes, counts and widths [N] int32,
    an example's tokens, answers and values; parts int32, the lengths of each one's prompt, first answer, and further ones but
    the last.
    """
    masks = [np.concatenate([np.zeros(len(one.prompt), bool), *one.masks]) for one in examples]
    parts = [[len(x) for x in (one.prompt, *(one.answers if len(one.answers) == 1 else one.answers[:-1]))] for one in examples]
    return {
        "tokens": np.concatenate([_NONE, *(part for one in examples for part in (one.prompt, *one.answers))]).astype(np.int32),
        "mask": np.concatenate([_NONE.astype(bool), *masks]),
        "values": np.concatenate([_NONE, *(one.values for one in examples)]).astype(np.float32),
        "sizes": np.array([len(mask) for mask in masks], np.int32),
        "counts": np.array([len(one.answers) for one in examples], np.int32),
        "widths": np.array([len(one.values) for one in examples], np.int32),
        "parts": np.array([n for lengths in parts for n in lengths], np.int32),
    }


def reader(flat: Row) -> Callable[[int], Example]:
    """i -> the i-th example of `stored`'s arrays."""
    tokens, mask, parts, counts = (flat[name] for name in ("tokens", "mask", "parts", "counts"))
    starts, value_starts = (_starts(flat[name]) for name in ("sizes", "widths"))
    part_starts = _starts(np.maximum(counts, 2))

    def example(i: int) -> Example:
        start, first, ends = int(starts[i]), part_starts[i], []
        for n in parts[first : first + counts[i]].tolist():  # of the prompt and of all answers but the last
            ends.append((ends[-1] if ends else start) + n)
        ends.append(int(starts[i + 1]))
        places = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
        values = flat["values"][value_starts[i] : value_starts[i + 1]]
        return Example(tokens[start : ends[0]], tuple([tokens[x] for x in places]), tuple([mask[x] for x in places]), values)

    return example


def _starts(sizes: np.ndarray) -> np.ndarray:
    """[N+1]: where each of consecutive parts of these sizes starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def lengths(flat: Row, shared: bool) -> np.ndarray:
    """[N] int32: the tokens of each stored example in its row."""
    prompt = flat["parts"][_starts(np.maximum(flat["counts"], 2))[:-1]]
    copies = np.where(prompt > 0, flat["counts"] - 1, 0) if shared else (flat["counts"] - 1) * prompt
    return (flat["sizes"] + copies).astype(np.int32)
