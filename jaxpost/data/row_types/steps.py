"""Solutions judged step by step: from a row to an answer, and to the tokens at which its steps end.

    {"prompt": "2+3*4?", "completions": ["3*4 = 14", "2+14 = 16"], "labels": [false, true]}

The steps are one answer, a line each, and are tokenised as that, behind their prompt, as every conversation is here. A step's
verdict stands at the token that holds its last letter: whoever judges there has read the step and nothing after it. These
tokens alone are learned.
"""

from collections.abc import Mapping

import numpy as np

from jaxpost.data import chat, examples, formats
from jaxpost.data.examples import Example, Row, Settings
from jaxpost.data.formats import Conversation, Rated
from jaxpost.data.readers import Record
from jaxpost.data.row_types import labelled
from jaxpost.errors import UserError

columns = labelled.columns


def encode(record: Record, settings: Settings) -> Example:
    """The solution of a record: its mask has the tokens that end the steps; its values are a number a token of the document, a
    step's label, 1 or 0, where the step ends.

    Raises UserError with the record's place for a row that is no such solution, where the template changes the answer, and
    where one token ends two steps.
    """
    rated, steps, labels = _read(record, settings.columns)
    example = Conversation([*rated.prompt, *rated.completion], rated.place, len(rated.prompt), rated.tools)
    tokens, starts, ends, (begin, end), whole = chat.answer(example, settings.tokenizer, settings.template)
    first = whole.find("\n".join(steps), begin, end)
    if first < 0:
        raise UserError(
            f"{rated.place}: the chat template changes the answer, so its steps are not found; use another template"
        )
    stops = first + np.cumsum([len(step) + 1 for step in steps]) - 1
    places = [int(np.flatnonzero((starts < stop) & (ends >= stop))[-1]) for stop in stops]
    if len(set(places)) < len(places):
        raise UserError(f"{rated.place}: one token ends two steps; write these as one step, with one label")
    mask, values = np.zeros(len(tokens), np.bool_), np.zeros(len(tokens), np.float32)
    mask[places], values[places] = True, labels
    return examples.of([{"tokens": tokens, "mask": mask, "start": int(np.argmax(ends > begin))}], values)


def fit(example: Example, settings: Settings, place: str) -> list[Example]:
    """As `examples.fit`; a step that is cut off loses its label."""
    fitted = examples.fit(example, settings, place)
    if fitted and fitted[0] is not example:
        (cut,) = fitted
        fitted = [cut._replace(values=cut.values[: len(cut.prompt) + len(cut.answers[0])])]
    return fitted


def lay_out(example: Example, settings: Settings) -> Row:
    """The columns of the document; labels are -1 where no step ends."""
    row = examples.lay_out(example, settings)
    return row | {"labels": np.where(row["mask"], example.values, np.float32(-1))}


def _read(record: Record, columns: Mapping[str, str]) -> tuple[Rated, list[str], list[bool]]:
    """(the prompt and the whole answer, its steps, whether each is right)."""
    row, place = formats.renamed(record, columns), record.place
    if missing := [c for c in ("prompt", "completions", "labels") if row.get(c) is None]:
        raise UserError(
            f"{place}: the objective judges the steps of a solution, and there is no column {missing[0]}; give prompt, "
            "completions (a list of steps) and labels (true or false for each), or name them in config.columns"
        )
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
        raise UserError(f"{place}: completions and labels must be lists of the same length, a label for each step")
    for number, (step, label) in enumerate(zip(steps, labels, strict=True), start=1):
        if not isinstance(step, str) or not step.strip():
            raise UserError(f"{place}: step {number} is {step!r}; write text, or take the step and its label out")
        if not isinstance(label, bool):
            raise UserError(f"{place}: the label of step {number} is {label!r}; write true or false")
    # Lines may be indented, but neither the answer's ends, which templates trim, nor a step's last letter is white space.
    steps = [steps[0].strip(), *(step.strip("\n").rstrip() for step in steps[1:])]
    answer = {"prompt": row["prompt"], "completion": "\n".join(steps), "label": True}
    beside = {c: row[c] for c in ("system", "tools") if row.get(c) is not None}
    return formats.labelled(Record(answer | beside, place)), steps, labels
