"""From a row to an example: the shape of a data set is recognised by its columns.

    chosen, rejected, [prompt | messages | conversations]   -> Preference
    prompt | messages | conversations, completions, ratings -> Preference: the best of several answers and the worst
    messages | conversations | prompt, completion, with a verdict true or false in label or kto_tag   -> Rated
    messages                               -> Conversation
    conversations                          -> Conversation: ShareGPT
    prompt, completion                     -> Completion: two strings (or, both being turns, a Conversation)
    instruction, [input, history,] output  -> Conversation: Alpaca, its history a list of earlier [instruction, output]
    question, answer                       -> Conversation: GSM8K, its answer with calculations and #### as it stands
    text                                   -> Text

The shapes are tried in that order and the first whose columns are all there (and not null) wins. Beside turns, `system` is a
system turn before them where they have none, and `tools` are the functions that they may call. Other columns are ignored, since
data sets carry identifiers, sources and scores that training does not need. The manners in which turns are written down are
those of `messages`.

A data set of other columns is read by naming them: `columns={"prompt": "problem", "completion": "solution"}` takes the prompt
from the column problem. Where the named columns make a shape by themselves, nothing else of the row is looked at; otherwise the
row's other columns stay beside them. So a shape may be chosen as well: `{"messages": "messages"}` learns rated conversations as
plain ones, verdict or no.

How much better the chosen answer is, where a row says so, becomes a Preference's margin: of `margin`, of `score_chosen` and
`score_rejected`, or of the ratings. `pair` and `labelled` take only what can be compared or is judged, and say what is missing:
what the columns hold besides, here a `score` and in `row_types/steps.py` the verdicts on a solution's steps, is no shape.

What is recognised is also checked here, once, so that nothing after this file has to wonder about roles, empty turns or types.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpost.config.resolve import nearest
from jaxpost.data.guess import suggested
from jaxpost.data.messages import Message, check, definitions, filled, string, turns, unweighted
from jaxpost.data.readers import Record
from jaxpost.errors import UserError

SHAPES = (
    "messages | conversations | prompt, completion | instruction, [input, history,] output | question, answer | text"
    ", [system, tools] beside turns (chosen, rejected, ratings, label, score and labels are for objectives that judge)"
)
COLUMNS = (
    *("messages", "conversations", "tools", "system", "prompt", "completion", "instruction", "input", "output"),
    *("history", "question", "answer", "text", "chosen", "rejected", "label", "kto_tag", "score"),
    *("completions", "ratings", "labels", "margin", "score_chosen", "score_rejected"),
)


class Conversation(NamedTuple):
    """Turns in the form of `messages`: an optional system turn, then user and assistant in turn. Rendered by a chat template.

    `prompt` is the number of messages that its row gave as the prompt, or None where the row made no such difference. `tools`
    are the functions that the assistant may call, or None. `untrained` are the places of assistant turns of weight 0. `numbers`
    are the numbers of the messages in their row, where they differ from 1, 2, ...
    """

    messages: list[Message]
    place: str
    prompt: int | None = None
    tools: list[dict[str, Any]] | None = None
    untrained: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()

    @property
    def numbered(self) -> tuple[int, ...]:
        """The number of each message in its row, from 1; 0 of one that is not the row's."""
        return self.numbers or tuple(range(1, len(self.messages) + 1))


class Completion(NamedTuple):
    """A prompt and what follows it, as plain strings: no template."""

    prompt: str
    completion: str
    place: str


class Text(NamedTuple):
    """A document of which every token is learned."""

    text: str
    place: str


class Preference(NamedTuple):
    """Two answers to one prompt, the first preferred. All three are lists of messages, in the form of `messages`.

    `prompt_messages + chosen_messages` and `prompt_messages + rejected_messages` are conversations that `messages.check` lets
    pass, save that an answer's last turn may be empty. Both answers begin with an assistant's turn; several turns are an answer
    that goes on after its first. A prompt that the row gave as a string is one user turn, an answer given as a string one
    assistant turn. Of whole conversations (lists, or HH-RLHF's transcripts) the prompt is what both begin with, up to the last
    place where both go on with an assistant's turn. `tools` as in Conversation. An answer's turns keep a weight of 0. `margin`
    is how much better the chosen one is, in the row's own unit; None where it does not say.
    """

    prompt_messages: list[Message]
    chosen_messages: list[Message]
    rejected_messages: list[Message]
    place: str
    tools: list[dict[str, Any]] | None = None
    margin: float | None = None


class Rated(NamedTuple):
    """One answer to a prompt and whether it is a good one (KTO). Prompt and completion are lists of messages.

    `prompt + completion` is a conversation as in Preference. The completion begins with an assistant's turn: it is the row's
    own completion, or of a conversation the last turn, which must be the assistant's. `label` is True for a good answer, or
    the answer's score.
    """

    prompt: list[Message]
    completion: list[Message]
    label: bool | float
    place: str
    tools: list[dict[str, Any]] | None = None


Example = Conversation | Completion | Text


def recognise(record: Record, columns: Mapping[str, str] | None = None) -> Example | Preference | Rated:
    """The example that a record holds; `columns` names the row's column for each column of a shape, where it differs.

    Raises UserError with the record's place if its columns are no known shape or its content breaks the rules of the shape.
    """
    row, place = renamed(record, columns), record.place
    if make := _shape(row):
        return make({column: value for column, value in row.items() if value is not None}, place)
    shown = ", ".join(f"{column} (null)" if value is None else str(column) for column, value in row.items()) or "none"
    remedy = f"or name them: --config.columns={suggested(row)}"
    raise UserError(f"{place}: columns not recognised: {shown}; rename them to one of: {SHAPES}; {remedy}")


def demonstration(record: Record, columns: Mapping[str, str] | None = None) -> Example:
    """As `recognise`, for learning by imitation: refuses judged answers with the columns that make demonstrations of them."""
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
            f"{example.place}: an answer with a verdict (label or kto_tag), which only a preference objective learns from; to "
            f'imitate every one, the bad ones too, say config.columns="{",".join(f"{c}={c}" for c in kept)}"'
        )
    return example


def pair(record: Record, columns: Mapping[str, str] | None = None) -> Preference:
    """As `recognise`, for comparing answers: refuses what is no pair, a pair of equal answers, and an empty prompt."""
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
    """The judged answer that a record holds: one with a verdict, or if scored with a number under `score`, which is its label.

    Refuses rows without it, and an empty prompt.
    """
    row, place = {c: value for c, value in renamed(record, columns).items() if value is not None}, record.place
    names, kind = (("score",), "a number") if scored else (("label", "kto_tag"), "true or false")
    label = row.get("score") if scored else _verdict(row)
    if not (_is_number(label) if scored else isinstance(label, bool)):
        given = next((f"{c} is {row[c]!r}, not {kind}" for c in names if c in row), f"there is no {names[0]}, {kind}")
        remedy = f"write {names[0]} as {kind} beside prompt and completion, or messages"
        if lost := [c for c in names if record.row.get(c) is not None and c not in row]:
            remedy = f"config.columns leaves it out, so say {lost[0]}={lost[0]} there too"
        raise UserError(f"{place}: {given}, and the objective learns from answers that are judged by it; {remedy}")
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
    """The record's row as `columns` has it read; UserError with its place where that names a column that is not there."""
    row, place = record
    if not columns:
        return row
    named = _named(row, columns, place)
    return named if _shape(named) else {k: v for k, v in row.items() if k not in columns.values()} | named


def _named(row: dict[str, Any], columns: Mapping[str, str], place: str) -> dict[str, Any]:
    for target, own in columns.items():
        if target not in COLUMNS:
            raise UserError(f"config.columns: no shape has a column {target!r}.{nearest(target, COLUMNS)}")
        if own not in row:
            has = ", ".join(map(str, row)) or "none"
            raise UserError(f"{place}: no column {own!r}, which config.columns names; the row has {has}")
    return {target: row[own] for target, own in columns.items()}


def _shape(row: dict[str, Any]):
    """The maker of the first shape whose columns are all in the row, or None."""
    present = {column for column, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= present:
        return _preference
    if {"completions", "ratings"} <= present and present & {"prompt", "messages", "conversations"}:
        return _best_and_worst
    if _answered(row) and isinstance(_verdict(row), bool):
        return _rated
    return next((make for needed, make in _MAKERS.items() if set(needed) <= present), None)


def _answered(row: dict[str, Any]) -> bool:
    """Whether there is an answer that a verdict may be about."""
    present = {column for column, value in row.items() if value is not None}
    return bool(present & {"messages", "conversations"}) or {"prompt", "completion"} <= present


def _conversation(row: dict[str, Any], place: str) -> Conversation:
    column = "messages" if "messages" in row else "conversations"
    return _checked(_with_system(turns(row[column], column, place), row, place), place, row.get("tools"))


def _with_system(messages: list[Message], row: dict[str, Any], place: str) -> list[Message]:
    """The turns after the row's own column of what the system says, if it has one and they have none."""
    system = string(row.get("system") or "", "system", place)
    before = [{"role": "system", "content": system}] if system and messages and messages[0]["role"] != "system" else []
    return before + messages


def _checked(messages: list[Message], place: str, tools: Any = None, prompt: int | None = None) -> Conversation:
    return conversation(check(messages, place), place, prompt, definitions(tools, place))


def conversation(messages: list[Message], place: str, prompt: int | None, tools: list | None) -> Conversation:
    """A Conversation of checked messages, whose weights of 0 become its `untrained`."""
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
        # Some data sets repeat the prompt in each answer; it then stands in front of the assistant's turn.
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
    """What the row says of the distance between its answers; columns of these names that hold something else are ignored."""
    if _is_number(row.get("margin")):
        return float(row["margin"])
    scores = row.get("score_chosen"), row.get("score_rejected")
    return float(scores[0] - scores[1]) if all(map(_is_number, scores)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _parting(chosen: list[Message], rejected: list[Message]) -> int:
    """The number of messages of the common prompt; 0 where there is none."""
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
    return Rated(unweighted(messages[:start]), messages[start:], _verdict(row), place, definitions(row.get("tools"), place))


def _verdict(row: dict[str, Any]) -> Any:
    label, tag = row.get("label"), row.get("kto_tag")
    return label if isinstance(label, bool) else tag


def turns_or(value: Any, column: str, place: str, role: str) -> list[Message]:
    """The turns in a column, a plain string being one turn of the role."""
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
}
