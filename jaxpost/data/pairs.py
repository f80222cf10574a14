"""Answers that are compared or judged: from a row to documents that belong together.

What such an objective learns from is a unit: a prompt and one answer to it or two. The answers are

    pairs        the chosen and the rejected one
    labelled     one, with a label: 1 is good, 0 is not
    scored       one, with a number
    steps        one that consists of steps, each with a label, 1 or 0, at the token that ends it (steps.py)
    mismatched   one with its label, and the answer to another row's prompt, label -1: it is never learned, but says how far
                 the policy has drifted from its reference on what nobody asked for (KTO's baseline)

Each answer is rendered behind its prompt and tokenised as one string, as every conversation is here, so no token is there that
the text would not have. The unit's prompt is what its answers' documents then begin with in common, up to the first token that
is learned. Where an answer's first letters change the last tokens of the prompt, those tokens count as the answer's: both sides
condition on the same ids, and no letter is lost at the seam. Of an answer the assistant's turns are learned, stop tokens
included; what a user says in between is not.

A unit lies in one row. Its documents follow each other, a pair the odd and the even segment; or, with a shared prefix, the
prompt is there once, without its last token, and each answer is a branch that begins with a copy of that token, so that the
hidden state before a token still predicts it:

    tokens     p1 p2 p3  a1 a2   p1 p2 p3  b1          p1 p2  p3 a1 a2  p3 b1
    segments    1  1  1   1  1    2  2  2   2           1  1   1  1  1   2  2
    positions   0  1  2   3  4    0  1  2   3           0  1   2  3  4   2  3
    branches                                            0  0   1  1  1   2  2
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from jaxpost.data import chat, formats, steps
from jaxpost.data.formats import Rated
from jaxpost.data.readers import Record
from jaxpost.errors import UserError

_ANSWERS = {"pairs": 2, "labelled": 1, "scored": 1, "mismatched": 2, "steps": 1}
SHAPES = tuple(_ANSWERS)
_TRAIN_ON = ("assistant", "completion", "last")

Row = dict[str, np.ndarray]


class Unit(NamedTuple):
    """prompt [p] int32, the answers' tokens [a] int32 and masks [a] bool, and the unit's number: a label, a score or a margin;
    of steps their labels, one for each token that is learned.
    """

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    value: float | np.ndarray


# The least there is, for the columns that units have.
EXAMPLE = Unit(np.zeros(1, np.int32), (np.zeros(1, np.int32),) * 2, (np.ones(1, np.bool_),) * 2, 0.0)


def encoder(
    shape: str, records: Sequence[Record], tokenizer, template, train_on: str, columns: Mapping[str, str], margins: bool
) -> Callable[[Record], Unit]:
    """record -> Unit of a shape, for those records. Raises UserError for a train_on that means nothing here; so does the
    function it gives, with the record's place, for a record that is no such unit, or without a margin where it must have one.
    """
    if train_on not in _TRAIN_ON:
        known = ", ".join(_TRAIN_ON)
        raise UserError(f"config.train_on: {train_on!r} of a prompt with judged answers; what is learned is one of {known}")

    document = partial(_document, tokenizer, template, train_on)
    if shape == "pairs":

        def encode(record: Record) -> Unit:
            pair = formats.pair(record, columns)
            if margins and pair.margin is None:
                raise UserError(f"{pair.place}: the objective reads margins, and there is no number under margin; give one")
            sides = (("chosen", pair.chosen_messages), ("rejected", pair.rejected_messages))
            both = [document(pair.prompt_messages, said, pair.tools, f"{pair.place}, {name}") for name, said in sides]
            return _unit(both, float("nan") if pair.margin is None else pair.margin)

        return encode
    if shape == "steps":

        def encode(record: Record) -> Unit:
            document, labels = steps.encode(record, tokenizer, template, columns)
            return _unit([document], labels)

        return encode
    others = _others(records, columns) if shape == "mismatched" else {}

    def encode(record: Record) -> Unit:
        own = formats.labelled(record, columns, shape == "scored")
        documents = [document(own.prompt, own.completion, own.tools, own.place)]
        if shape == "mismatched":
            if (other := others.get(id(record))) is None:
                raise UserError(f"{own.place}: there is no other prompt whose answer could be its mismatch; give more rows")
            place = f"{own.place}, with the answer of {other.place}"
            documents.append(document(own.prompt, other.completion, own.tools, place))
        return _unit(documents, float(own.label))

    return encode


def _document(tokenizer, template, train_on: str, prompt: list, answer: list, tools: list | None, place: str) -> dict:
    """{tokens, mask: [n]} of a prompt with an answer, and where the answer `start`s."""
    example = formats.conversation([*prompt, *answer], place, len(prompt), tools)
    whole = chat.encode(example, tokenizer, template, "completion")
    learned = whole if train_on != "last" else chat.encode(example, tokenizer, template, "last")
    if not learned["mask"].any():
        raise UserError(f"{place}: every turn of the answer is marked as not to be learned; remove the row or a mark")
    if example.untrained:  # the answer begins at its first turn, learned or not
        whole = chat.encode(example._replace(untrained=()), tokenizer, template, "completion")
    return learned | {"start": int(np.argmax(whole["mask"]))}


def _others(records: Sequence[Record], columns: Mapping[str, str] | None) -> dict[int, Rated]:
    """For each sound record, by identity, the last one before it (going round) that has another prompt."""
    sound = []
    for record in records:
        try:
            sound.append((id(record), formats.labelled(record, columns)))
        except UserError:  # told where the record itself is encoded
            continue
    found: dict[int, Rated] = {}
    last = None
    # Twice round: what stands before the first is at the end.
    for (_, before), (key, own) in zip([*sound[-1:], *sound, *sound], [*sound, *sound], strict=False):
        other = before if before.prompt != own.prompt else last
        if other is not None and other.prompt != own.prompt:
            found[key] = other
        last = found.get(key)
    return found


def _unit(documents: Sequence[dict], value: float | np.ndarray) -> Unit:
    """The documents ({tokens, mask}, and the `start` of the answer) with what they begin with in common taken out as the
    prompt.
    """
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
    return Unit(first[:size], tuple(document["tokens"][size:] for document in documents), tuple(masks), value)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def length(prompt: int, answers: Sequence[int], shared: bool) -> int:
    """The tokens of a unit in its row."""
    return max(prompt - 1, 0) + sum(min(prompt, 1) + n for n in answers) if shared else sum(prompt + n for n in answers)


def fit(unit: Unit, window: int, longest: int, too_long: str, shared: bool, place: str) -> Unit | None:
    """The unit made to fit a row of `window` tokens, and each of its documents into `longest`; None if it is dropped.

    too_long: "error"; "drop"; "truncate" cuts the ends of the answers, the longer one first, and never the prompt. What is cut
    loses its stop token. A unit of which an answer then has nothing to learn, or whose answers are equal, is dropped.
    """
    size = len(unit.prompt)
    lengths = [len(answer) for answer in unit.answers]
    whole = length(size, lengths, shared)
    if whole <= window and size + max(lengths) <= longest:
        return unit
    if too_long == "drop":
        return None
    if too_long == "error":
        remedy = 'or say too_long="truncate" (answers are cut, never the prompt) or "drop"'
        if size + max(lengths) > longest < window:  # a longer window would not help
            raise UserError(f"{place}: a document of {size + max(lengths)} tokens, and the model takes {longest}; {remedy[3:]}")
        what = "the prompt and its answer have" if len(lengths) == 1 else "the prompt with both answers has"
        raise UserError(f"{place}: {what} {whole} tokens and the window {window}; make the window {whole} or longer, {remedy}")
    answers, masks = _cut(unit, window, longest, shared)
    equal = len(answers) == 2 and np.array_equal(*answers)
    value = unit.value[: masks[0].sum()] if isinstance(unit.value, np.ndarray) else unit.value
    return None if equal or not all(mask.any() for mask in masks) else Unit(unit.prompt, answers, masks, value)


def _cut(unit: Unit, window: int, longest: int, shared: bool) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The unit's answers and masks, the longer answer cut first."""
    size, lengths = len(unit.prompt), [len(answer) for answer in unit.answers]
    room = window - length(size, [0] * len(lengths), shared)
    shares = [room] if len(lengths) == 1 else [max(room // 2, room - other) for other in reversed(lengths)]
    kept = [max(0, min(n, share, longest - size)) for n, share in zip(lengths, shares, strict=True)]
    cut = [tuple(part[:n] for part, n in zip(parts, kept, strict=True)) for parts in (unit.answers, unit.masks)]
    return cut[0], cut[1]


def equal_once_cut(unit: Unit, window: int, longest: int, shared: bool) -> bool:
    """Whether the unit's two answers are there, cut to fit, and the same: nothing is left to compare."""
    answers, _ = _cut(unit, window, longest, shared)
    return len(answers) == 2 and len(answers[0]) > 0 and np.array_equal(*answers)


def needed(unit: Unit, too_long: str, shared: bool) -> int:
    """The least window with which a unit is of use: up to each answer's first learned token where it is cut, else all of it."""
    ends = [int(np.argmax(mask)) + 1 for mask in unit.masks] if too_long == "truncate" else map(len, unit.answers)
    return length(len(unit.prompt), list(ends), shared)


def layout(unit: Unit, shape: str, shared: bool, margins: bool = False) -> Row:
    """The unit as columns [n] of its row: tokens, mask, segments, positions; with a shared prefix `branches`; and `labels` of
    what is labelled, or `margins` where they are asked for, constant over each document; `labels` of steps stand where these
    end, and -1 elsewhere.
    """
    size, parts = len(unit.prompt), []
    kept = max(size - 1, 0) if shared else 0
    if shared:
        parts.append(_part(unit.prompt[:kept], np.zeros(kept, bool), 1, 0, 0))
    for number, (answer, mask) in enumerate(zip(unit.answers, unit.masks, strict=True), start=1):
        tokens = np.concatenate([unit.prompt[kept:], answer])
        parts.append(_part(tokens, np.concatenate([np.zeros(size - kept, bool), mask]), number, kept, number))
    row = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not shared:
        del row["branches"]
    own = np.float32(unit.value)
    if shape == "steps":
        row["labels"] = np.full(len(row["tokens"]), np.float32(-1))
        row["labels"][row["mask"]] = own
    elif shape != "pairs":
        row["labels"] = np.where(row["segments"] == 1, own, np.float32(-1))
    elif margins:
        row["margins"] = np.full(len(row["tokens"]), own)
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


def stored(units: Sequence[Unit]) -> dict[str, np.ndarray]:
    """Units as flat arrays: tokens and mask [all], sizes [N], and parts [N,2], the prompt's and the first answer's length;
    values [N], or of steps [all], a label at each token of the mask.
    """
    none = np.zeros(0, np.int32)
    masks = [np.concatenate([np.zeros(len(unit.prompt), bool), *unit.masks]) for unit in units]
    mask = np.concatenate([none.astype(bool), *masks])
    values = np.concatenate([none, *(np.atleast_1d(unit.value) for unit in units)]).astype(np.float32)
    if units and isinstance(units[0].value, np.ndarray):
        at_ends, values = values, np.zeros(len(mask), np.float32)
        values[mask] = at_ends
    return {
        "tokens": np.concatenate([none, *(part for unit in units for part in (unit.prompt, *unit.answers))]).astype(np.int32),
        "mask": mask,
        "sizes": np.array([len(mask) for mask in masks], np.int32),
        "parts": np.array([(len(unit.prompt), len(unit.answers[0])) for unit in units], np.int32).reshape(-1, 2),
        "values": values,
    }


def unit_at(flat: dict[str, np.ndarray], start: int, number: int, shape: str) -> Unit:
    """The unit of a number whose flat arrays begin at start: the inverse of `stored`."""
    size, first = flat["parts"][number]
    cuts = [start + size, start + size + first, start + flat["sizes"][number]][: 1 + _ANSWERS[shape]]
    places = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    answers, masks = (tuple(flat[name][place] for place in places) for name in ("tokens", "mask"))
    value = flat["values"][places[0]][masks[0]] if shape == "steps" else float(flat["values"][number])
    return Unit(flat["tokens"][start : start + size], answers, masks, value)


def lengths(flat: dict[str, np.ndarray], shape: str, shared: bool) -> np.ndarray:
    """[N] int32: the tokens of each unit in its row."""
    prompt, count = flat["parts"][:, 0], _ANSWERS[shape]
    copies = np.where(prompt > 0, count - 1, 0) if shared else (count - 1) * prompt
    return (flat["sizes"] + copies).astype(np.int32)
