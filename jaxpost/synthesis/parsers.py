"""From a completion to rows: (completion, record, *, ...) -> a list of rows (dicts), one row, or a text: why there is none.

A parser is total: any text gives one of the three. It may carry `parser.example`, a completion that it can read, by which later
stages are checked before anything is asked. `keep` names keys of the record that each row takes along, as where it came from.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Rows = list[dict] | str


def text(completion: str, record: Mapping, *, field: str = "text", keep: Sequence[str] = ()) -> Rows:
    """The completion as one text: a document, a rewritten passage."""
    content = completion.strip()
    return [{field: content, **_kept(record, keep)}] if content else "empty"


def split(
    completion: str,
    record: Mapping,
    *,
    at: str = "<|pipe|>",
    fields: Sequence[str] = ("prompt", "completion"),
    fill: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
) -> Rows:
    """The parts between separators, exactly as many as `fields`, none of them empty.

    fill: {placeholder: key of the record}, replaced in every part. With `fill={"{{context}}": "context"}` it reads what the
    model of "Learning to Generate Instruction Tuning Datasets for Zero-Shot Task Adaptation" (Bonito) writes.
    """
    parts = [part.strip() for part in completion.split(at)]
    if len(parts) != len(fields):
        return f"not {len(fields)} parts"
    for placeholder, key in (fill or {}).items():
        parts = [part.replace(placeholder, str(record[key])) for part in parts]
    return [{**dict(zip(fields, parts, strict=True)), **_kept(record, keep)}] if all(parts) else "an empty part"


def tagged(
    completion: str,
    record: Mapping,
    *,
    tags: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
) -> Rows:
    """A row of each group of tags in their order, as "<question>...</question> <answer>...</answer>", maybe several.

    tags: {tag: field of the row}; {"question": "prompt", "answer": "completion"} if None.
    """
    tags = tags or {"question": "prompt", "answer": "completion"}
    between = r"\s*".join(rf"<{re.escape(tag)}>((?:(?!</?{re.escape(tag)}>).)*)</{re.escape(tag)}>" for tag in tags)
    groups = re.findall(between, completion, re.DOTALL)
    texts = [[part.strip() for part in ([group] if isinstance(group, str) else group)] for group in groups]
    rows = [{**dict(zip(tags.values(), parts, strict=True)), **_kept(record, keep)} for parts in texts if all(parts)]
    return rows or "no tags"


def numbered(completion: str, record: Mapping, *, field: str = "instruction", keep: Sequence[str] = ()) -> Rows:
    """A row of each item of a numbered list ("1. ...", "2) ..."), whose lines follow until the next number; what stands before
    the first number is left out.
    """
    items = re.split(r"^[^\S\n]*\d+[^\S\n]*[.):]\s*", completion, flags=re.MULTILINE)[1:]
    rows = [{field: item.strip(), **_kept(record, keep)} for item in items if item.strip()]
    return rows or "no numbered item"


def json_rows(completion: str, record: Mapping, *, fields: Sequence[str] = (), keep: Sequence[str] = ()) -> Rows:
    """The objects of a JSON object or list, alone or in a fenced block of a longer text; each must have all `fields`."""
    blocks = re.findall(r"```(?:json|JSON)?[^\S\n]*\n(.*?)```", completion, re.DOTALL)
    values = [value for block in (blocks or [completion]) if (value := _json(block)) is not None]
    rows = [row for value in values for row in (value if isinstance(value, list) else [value])]
    if not rows:
        return "no JSON"
    if not all(isinstance(row, dict) for row in rows):
        return "JSON without objects"
    if any(row.get(field) in (None, "", [], {}) for row in rows for field in fields):
        return "JSON without a field"
    return [{**row, **_kept(record, keep)} for row in rows]


def _json(block: str) -> Any:
    try:
        return json.loads(block, parse_constant=_refused)  # NaN and Infinity are no JSON
    except (ValueError, RecursionError):
        return None


def _refused(name: str) -> None:
    raise ValueError(name)


def _kept(record: Mapping, keep: Sequence[str]) -> dict:
    return {key: record.get(key) for key in keep}


text.example = "A text."
split.example = "What is it?<|pipe|>A text."
tagged.example = "<question>What is it?</question> <answer>A text.</answer>"
numbered.example = "1. Say what it is."
json_rows.example = '{"prompt": "What is it?", "completion": "A text."}'
