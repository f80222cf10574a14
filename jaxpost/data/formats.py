"""From a row to an example: a row's columns determine its shape.

    chosen, rejected, [prompt | messages | conversations]   -> Preference
    prompt | messages | conversations, completions, ratings -> Preference: the best of several answers and the worst
    messages | conversations | prompt, completion, with true or false in label or kto_tag   -> Rated
    messages                               -> Conversation
    conversations                          -> Conversation: ShareGPT
    prompt, completion                     -> Completion: two strings (or, both being turns, a Conversation)
    instruction, [input, history,] output  -> Conversation: Alpaca, its history a list of earlier [instruction, output]
    question, answer                       -> Conversation: GSM8K, its answer with calculations and #### as it stands
    text                                   -> Text
    parts                                  -> Parts: texts that are tokenised apart, each learned or not

The shapes are tried in that order; the first whose columns are all present and not null is taken. Beside turns, `system` is a
system turn if they have none, and `tools` are the functions that they may call. Other columns, such as identifiers, sources and
scores, are ignored. `messages` has the formats of turns.

`columns={"prompt": "problem", "completion": "solution"}` reads the prompt from the column problem. If the named columns make a
shape by themselves, the rest of the row is ignored; otherwise the row's other columns stay. So `columns` also chooses a shape:
`{"messages": "messages"}` learns rated conversations as plain ones, with or without a label.

A Preference's margin is `margin`, or the difference of `score_chosen` and `score_rejected`, or of the ratings. `pair` and
`labelled` take only rows with two answers or a judged one, and say what is missing. Other columns with judgements, here a
`score` and in `row_types/steps.py` the labels of a solution's steps, make no shape.

Rows are also checked here, once, so that later code need not check roles, empty turns or types.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpost.config.resolve import nearest
from jaxpost.data import parts
from jaxpost.data.guess import suggested
from jaxpost.data.messages import Message, check, definitions, filled, string, turns, unweighted
from jaxpost.data.readers import Record
from jaxpost.errors import UserError

SHAPES = (
    "messages | conversations | prompt, completion | instruction, [input, history,] output | question, answer | text | parts"
    ", [system, tools] beside turns (chosen, rejected, ratings, label, score and labels are for objectives that judge)"
)
COLUMNS = (
    *("messages", "conversations", "tools", "system", "prompt", "completion", "instruction", "input", "output"),
    *("history", "question", "answer", "text", "parts", "chosen", "rejected", "label", "kto_tag", "score"),
    *("completions", "ratings", "labels", "margin", "score_chosen", "score_rejected"),
)


class Conversation(NamedTuple):
    """Messages, rendered by a chat template: an optional system turn, then user and assistant alternate.

    prompt: the number of messages in the row's prompt; None if the row has no prompt apart. tools: the functions that the
    assistant may call, or None. untrained: the indices of assistant turns of weight 0. numbers: the messages' numbers in the
    row, if not 1, 2, ...
    """

    messages: list[Message]
    place: str
    prompt: int | None = None
    tools: list[dict[str, Any]] | None = None
    untrained: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()

    @property
    def numbered(self) -> tuple[int, ...]:
        """Each message's number in the row, from 1; 0 for one that is not in the row."""
        return self.numbers or tuple(range(1, len(self.messages) + 1))


class Completion(NamedTuple):
    """A prompt and its completion as plain strings, without a template."""

    prompt: str
    completion: str
    place: str


class Text(NamedTuple):
    """A document; every token is learned."""

    text: str
    place: str


class Preference(NamedTuple):
    """Two answers to one prompt, the first preferred. All three are lists of messages, in the format of `messages`.

    `prompt_messages + chosen_messages` and `prompt_messages + rejected_messages` are conversations that pass `messages.check`,
    but an answer's last turn may be empty. Both answers begin with an assistant turn and may have several turns. A prompt that
    is a string is one user turn, an answer that is a string one assistant turn. Of two whole conversations (lists, or HH-RLHF's
    transcripts) the prompt is their common prefix, up to the last place where both continue with an assistant turn. tools: as
    in Conversation. An answer's turns keep a weight of 0. margin: how much better the chosen answer is, in the row's unit, or
    None.
    """

    prompt_messages: list[Message]
    chosen_messages: list[Message]
    rejected_messages: list[Message]
    place: str
    tools: list[dict[str, Any]] | None = None
    margin: float | None = None


class Rated(NamedTuple):
    """One answer to a prompt and whether it is a good one (KTO). Prompt and completion are lists of messages.

    `prompt + completion` is a conversation as in Preference. The completion is the row's, or a conversation's last turn, and
    begins with an assistant turn. label: True for a good answer, or the answer's score.
    """

    prompt: list[Message]
    completion: list[Message]
    label: bool | float
    place: str
    tools: list[dict[str, Any]] | None = None


Example = Conversation | Completion | Text | parts.Parts


def recognise(record: Record, columns: Mapping[str, str] | None = None) -> Example | Preference | Rated:
    """The example of a record. columns: {column of a shape: column of the row}, where they differ.

    Raises UserError with the record's place if its columns are no known shape or its content breaks the shape's rules.
    """
    row, place = renamed(record, columns), record.place
    if make := _shape(row):
        return make({column: value for column, value in row.items() if value is not None}, place)
    shown = ", ".join(f"{column} (null)" if value is None else str(column) for column, value in row.items()) or "none"
    remedy = f"or name them: --config.columns={suggested(row)}"
    raise UserError(f"{place}: columns not recognised: {shown}; rename them to one of: {SHAPES}; {remedy}")


def demonstration(record: Record, columns: Mapping[str, str] | None = None) -> Example:
    """As `recognise`, for imitation: refuses judged answers, and names the columns that would make them demonstrations."""
    example = recognise(record, columns)
    if isinstance(example, Preference):
        way = next((f"prompt={c},completion=chosen" for c in ("prompt", "conversations") if c in record.row), "messages=chosen")
        remedy = f'to imitate the chosen one say config.columns="{way}"'
        if "chosen" not in record.row:
            remedy = "to imitate the best answer write it under completion"
        raise UserError(
            f"{example.place}: a pair of answers, chosen and rejected, which only a preference objective learns from; {remedy}"
        )
    if isinstance(example, Rated):
        kept = [c for c in ("messages", "conversations", "prompt", "completion") if c in record.row]
        raise UserError(
            f"{example.place}: a judged answer (label or kto_tag), which only a preference objective learns from; to "
            f'imitate every one, the bad ones too, say config.columns="{",".join(f"{c}={c}" for c in kept)}"'
        )
    return example


def pair(record: Record, columns: Mapping[str, str] | None = None) -> Preference:
    """As `recognise`, for comparisons: refuses rows without two answers, equal answers, and an empty prompt."""
    row = renamed(record, columns)
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if row.get(side) is not None and row.get(other) is None:
            raise UserError(f"{record.place}: there is no {other} answer beside the {side} one; give it, or remove the row")
    if _shape(row) not in (_preference, _best_and_worst):
        raise UserError(
            f"{record.place}: the objective compares two answers, and the row's columns {', '.join(map(str, row))} hold none "
            "to compare; give chosen and rejected (docs/data.md lists the forms), name them in config.columns, or use an "
            "objective that learns from such rows"
        )
    preference = recognise(record, columns)
    if unweighted(preference.chosen_messages) == unweighted(preference.rejected_messages):
        raise UserError(f"{preference.place}: chosen and rejected are the same answer, so neither is better; remove the row")
    _check_prompt(preference.prompt_messages, preference.place)
    return preference


def labelled(record: Record, columns: Mapping[str, str] | None = None, scored: bool = False) -> Rated:
    """The judged answer of a record. Its label is true or false; if scored, the number under `score`.

    Refuses rows without a label, and an empty prompt.
    """
    row, place = {c: value for c, value in renamed(record, columns).items() if value is not None}, record.place
    names, kind = (("score",), "a number") if scored else (("label", "kto_tag"), "true or false")
    label = row.get("score") if scored else _label(row)
    if not (_is_number(label) if scored else isinstance(label, bool)):
        fault = next((f"{c} is {row[c]!r}, not {kind}" for c in names if c in row), f"there is no {names[0]}, {kind}")
        remedy = f"write {names[0]} as {kind} beside prompt and completion, or messages"
        if lost := [c for c in names if record.row.get(c) is not None and c not in row]:
            remedy = f"config.columns leaves it out, so say {lost[0]}={lost[0]} there too"
        raise UserError(f"{place}: {fault}, and the objective learns from answers that are judged by it; {remedy}")
    if not _answered(row):
        raise UserError(
            f"{place}: no answer to judge in the columns {', '.join(map(str, row))}; name them, as in "
            f'config.columns="prompt=question,completion=answer,{names[0]}={names[0]}"'
        )
    rated = _rated(row, place)._replace(label=float(label) if scored else label)
    _check_prompt(rated.prompt, place)
    return rated


def _check_prompt(prompt: list[Message], place: str) -> None:
    if prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip():
        raise UserError(f"{place}: the prompt is empty, so there is nothing to answer; fill it in or remove the row")


def renamed(record: Record, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The record's row renamed by `columns`. Raises UserError with its place if that names a missing column."""
    row, place = record
    if not columns:
        return row
    named = _named(row, columns, place)
    return named if _shape(named) else {k: v for k, v in row.items() if k not in columns.values()} | named


def _named(row: dict[str, Any], columns: Mapping[str, str], place: str) -> dict[str, Any]:
    for target, source in columns.items():
        if target not in COLUMNS:
            raise UserError(f"config.columns: no shape has a column {target!r}.{nearest(target, COLUMNS)}")
        if source not in row:
            has = ", ".join(map(str, row)) or "none"
            raise UserError(f"{place}: no column {source!r}, which config.columns names; the row has {has}")
    return {target: row[source] for target, source in columns.items()}


def _shape(row: dict[str, Any]):
    """The function for the first shape whose columns are all in the row, or None."""
    present = {column for column, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= present:
        return _preference
    if {"completions", "ratings"} <= present and present & {"prompt", "messages", "conversations"}:
        return _best_and_worst
    if _answered(row) and isinstance(_label(row), bool):
        return _rated
    return next((make for needed, make in _MAKERS.items() if set(needed) <= present), None)


def _answered(row: dict[str, Any]) -> bool:
    """Whether the row has an answer that a label may be about."""
    present = {column for column, value in row.items() if value is not None}
    return bool(present & {"messages", "conversations"}) or {"prompt", "completion"} <= present


def _conversation(row: dict[str, Any], place: str) -> Conversation:
    column = "messages" if "messages" in row else "conversations"
    return _checked(_with_system(turns(row[column], column, place), row, place), place, row.get("tools"))


def _with_system(messages: list[Message], row: dict[str, Any], place: str) -> list[Message]:
    """The turns after a system turn from the row's `system` column, if it has one and they have none."""
    system = string(row.get("system") or "", "system", place)
    before = [{"role": "system", "content": system}] if system and messages and messages[0]["role"] != "system" else []
    return before + messages


def _checked(messages: list[Message], place: str, tools: Any = None, prompt: int | None = None) -> Conversation:
    return conversation(check(messages, place), place, prompt, definitions(tools, place))


def conversation(messages: list[Message], place: str, prompt: int | None, tools: list | None) -> Conversation:
    """A Conversation of checked messages; turns of weight 0 become its `untrained`."""
    untrained = tuple(i for i, message in enumerate(messages) if message.get("weight") == 0)
    return Conversation(unweighted(messages), place, prompt, tools, untrained)


def _prompted(row: dict[str, Any], place: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, (list, dict)) and isinstance(completion, (list, dict)):
        before, after = _with_system(turns(prompt, "prompt", place), row, place), turns(completion, "completion", place)
        example = _checked(before + after, place, row.get("tools"), prompt=len(before))
        if not any(message["role"] == "assistant" for message in after):
            raise UserError(f"{place}: the completion has no assistant turn, so there is nothing to learn; add one")
        return example
    if isinstance(prompt, (list, dict)) or isinstance(completion, (list, dict)):
        raise UserError(f"{place}: prompt and completion must both be strings or both lists of messages; write both alike")
    if definitions(row.get("tools"), place):
        raise UserError(f"{place}: tools go with messages; write prompt and completion as lists of them, or leave them out")
    if row.get("system"):
        raise UserError(f"{place}: system goes with messages; write prompt and completion as lists of them, or leave it out")
    return Completion(string(prompt, "prompt", place), filled(completion, "completion", place), place)


def _alpaca(row: dict[str, Any], place: str) -> Conversation:
    parts = [string(row.get(column, ""), column, place) for column in ("instruction", "input")]
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"{place}: history must be a list of [instruction, output] pairs; write it so, or leave it out")
    earlier = [turn for pair in history for turn in _pair(*(filled(text, "history", place) for text in pair))]
    messages = earlier + _pair("\n".join(part for part in parts if part), filled(row["output"], "output", place))
    return _checked(_with_system(messages, row, place), place, row.get("tools"))


def _question(row: dict[str, Any], place: str) -> Conversation:
    question, answer = (filled(row[column], column, place) for column in ("question", "answer"))
    return _checked(_pair(question, answer), place, row.get("tools"))


def _pair(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _text(row: dict[str, Any], place: str) -> Text:
    return Text(filled(row["text"], "text", place), place)


def _preference(row: dict[str, Any], place: str) -> Preference:
    column = next((c for c in ("messages", "conversations", "prompt") if c in row), None)
    before = turns_or(row[column], column, place, "user") if column else []
    whole = []
    for side in ("chosen", "rejected"):
        after = turns_or(row[side], side, place, "assistant")
        if not after:
            raise UserError(f"{place}: {side} has no turns; give an answer or remove the row")
        if not before and after[0]["role"] == "assistant":
            raise UserError(f"{place}: {side} is an answer without a prompt; give a column prompt, or whole conversations")
        # Some data sets repeat the prompt in each answer, before the assistant's turn.
        whole.append(_with_system(after if after[0]["role"] != "assistant" else before + after, row, place))
    chosen, rejected, before = unweighted(whole[0]), unweighted(whole[1]), unweighted(before)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        check(side, f"{place}, {name}", empty=True)
        if side[: len(before)] != before and [m for m in side if m["role"] != "system"][: len(before)] != before:
            raise UserError(f"{place}: {name} begins with another prompt than {column}; leave out {column}, or make them agree")
    start = _parting(chosen, rejected)
    if not start:
        raise UserError(f"{place}: chosen and rejected answer different prompts; the turns before the answers must be equal")
    tools = definitions(row.get("tools"), place)
    return Preference(chosen[:start], whole[0][start:], whole[1][start:], place, tools, _margin(row))


def _best_and_worst(row: dict[str, Any], place: str) -> Preference:
    answers, ratings = row["completions"], row["ratings"]
    if not isinstance(answers, list) or not isinstance(ratings, list) or len(answers) != len(ratings):
        raise UserError(f"{place}: completions and ratings must be lists of the same length, a rating for each answer")
    if not all(map(_is_number, ratings)):
        raise UserError(f"{place}: a rating is no number; write them all as numbers, or remove the row")
    if len(set(ratings)) < 2:
        raise UserError(f"{place}: the ratings tell no answer from another, so none is preferred; remove the row")
    best, worst = ratings.index(max(ratings)), ratings.index(min(ratings))
    sides = {"chosen": answers[best], "rejected": answers[worst], "margin": ratings[best] - ratings[worst]}
    return _preference({k: v for k, v in row.items() if k not in ("completions", "ratings")} | sides, place)


def _margin(row: dict[str, Any]) -> float | None:
    """The margin between the row's answers; columns of these names without numbers are ignored."""
    if _is_number(row.get("margin")):
        return float(row["margin"])
    scores = row.get("score_chosen"), row.get("score_rejected")
    return float(scores[0] - scores[1]) if all(map(_is_number, scores)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _parting(chosen: list[Message], rejected: list[Message]) -> int:
    """The number of messages of the common prompt; 0 if there is none."""
    same = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        same += 1
    ways = range(min(same, len(chosen) - 1, len(rejected) - 1), 0, -1)
    return next((i for i in ways if chosen[i]["role"] == rejected[i]["role"] == "assistant"), 0)


def _rated(row: dict[str, Any], place: str) -> Rated:
    if "messages" in row or "conversations" in row:
        column = "messages" if "messages" in row else "conversations"
        messages = _with_system(turns(row[column], column, place), row, place)
        start = len(messages) - 1
    else:
        before = _with_system(turns_or(row["prompt"], "prompt", place, "user"), row, place)
        messages = before + turns_or(row["completion"], "completion", place, "assistant")
        start = len(before)
    check(messages, place, empty=True)
    if start == len(messages) or messages[start]["role"] != "assistant":
        raise UserError(f"{place}: the answer that is judged must be an assistant's turn at the end; end the row with it")
    return Rated(unweighted(messages[:start]), messages[start:], _label(row), place, definitions(row.get("tools"), place))


def _label(row: dict[str, Any]) -> Any:
    label, tag = row.get("label"), row.get("kto_tag")
    return label if isinstance(label, bool) else tag


def turns_or(value: Any, column: str, place: str, role: str) -> list[Message]:
    """The turns in a column; a plain string is one turn of the role."""
    if not isinstance(value, (str, list, dict)):
        raise UserError(f"{place}: {column} is {value!r}, neither text nor a list of messages; write it as one of these")
    if isinstance(value, str) and not value.startswith("\n\nHuman:"):
        return [{"role": role, "content": value}]
    return turns(value, column, place)


_MAKERS = {
    ("messages",): _conversation,
    ("conversations",): _conversation,
    ("prompt", "completion"): _prompted,
    ("instruction", "output"): _alpaca,
    ("question", "answer"): _question,
    ("text",): _text,
    ("parts",): parts.of,
}
