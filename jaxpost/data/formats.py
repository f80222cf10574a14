"""From a row to an example: the shape of a data set is recognised by its columns, never configured.

Four shapes of row make three kinds of example:

    messages                        -> Conversation: a list of {"role", "content"}
    prompt, completion              -> Completion: two strings (or, both being lists of messages, a Conversation)
    instruction, [input, system,] output   -> Conversation: the Alpaca shape
    text                            -> Text

The shapes are tried in that order and the first whose columns are all there (and not null) wins; other columns are ignored,
since data sets carry identifiers, sources and scores that training does not need. What is recognised is also checked here,
once, so that nothing after this file has to wonder about roles, empty turns or types. The checks are strict on purpose: an
empty assistant turn or two user turns in a row is a defect of the data that would otherwise be learned.
"""

from typing import Any, NamedTuple

from jaxpost.data.readers import Record
from jaxpost.errors import UserError

ROLES = ("system", "user", "assistant")
SHAPES = "messages | prompt, completion | instruction, [input,] [system,] output | text"


class Conversation(NamedTuple):
    """Turns of {"role", "content"}: an optional system turn, then user and assistant in turn. Rendered by a chat template.

    `prompt` is the number of messages that its row gave as the prompt, or None where the row made no such difference.
    """

    messages: list[dict[str, str]]
    place: str
    prompt: int | None = None


class Completion(NamedTuple):
    """A prompt and what follows it, as plain strings: no template."""

    prompt: str
    completion: str
    place: str


class Text(NamedTuple):
    """A document of which every token is learned."""

    text: str
    place: str


Example = Conversation | Completion | Text


def recognise(record: Record) -> Example:
    """The example that a record holds.

    Raises UserError with the record's place if its columns are no known shape or its content breaks the rules of the shape.
    """
    row, place = record
    present = {column for column, value in row.items() if value is not None}
    if "messages" in present:
        return Conversation(check(row["messages"], place), place)
    if {"prompt", "completion"} <= present:
        return _prompted(row["prompt"], row["completion"], place)
    if {"instruction", "output"} <= present:
        return Conversation(check(_alpaca(row, place), place), place)
    if "text" in present:
        return Text(_filled(row["text"], "text", place), place)
    found = ", ".join(column if column in present else f"{column} (null)" for column in row) or "none"
    raise UserError(f"{place}: columns not recognised: {found}; rename them to one of: {SHAPES}")


def check(messages: Any, place: str) -> list[dict[str, str]]:
    """The messages, cut down to role and content, if they follow the rules; UserError with the place and the turn if not."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{place}: messages must be a list of objects with role and content")
    expected = "user"
    for number, message in enumerate(messages, start=1):
        where = f"{place}, message {number}"
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"{where}: role {role!r} is not supported; the roles are {', '.join(ROLES)}")
        content = _string(message.get("content"), "content", where)
        if role == "system":
            if number > 1:
                raise UserError(f"{where}: a system turn must be first; move it there or fold it into the user's turn")
            continue
        if role != expected:
            raise UserError(f"{where}: the role is {role}, not {expected}; user and assistant must alternate, user first")
        if role == "assistant":
            _filled(content, "content of the assistant's turn", where)
        expected = "user" if role == "assistant" else "assistant"
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise UserError(f"{place}: a conversation without a user turn; add one")
    if "assistant" not in roles:
        raise UserError(f"{place}: a conversation without an assistant turn leaves nothing to learn; add one or remove the row")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _prompted(prompt: Any, completion: Any, place: str) -> Example:
    if isinstance(prompt, list) and isinstance(completion, list):
        found = Conversation(check(prompt + completion, place), place, prompt=len(prompt))
        if not any(message["role"] == "assistant" for message in completion):
            raise UserError(f"{place}: the completion has no assistant turn, so there is nothing to learn; add one")
        return found
    if isinstance(prompt, list) or isinstance(completion, list):
        raise UserError(f"{place}: prompt and completion must both be strings or both lists of messages")
    return Completion(_string(prompt, "prompt", place), _filled(completion, "completion", place), place)


def _alpaca(row: dict[str, Any], place: str) -> list[dict[str, str]]:
    parts = [_string(row.get(column) or "", column, place) for column in ("instruction", "input")]
    system = _string(row.get("system") or "", "system", place)
    turns = [("user", "\n".join(part for part in parts if part)), ("assistant", _filled(row["output"], "output", place))]
    return [{"role": role, "content": content} for role, content in ([("system", system)] if system else []) + turns]


def _string(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        found = "missing or null" if value is None else f"of type {type(value).__name__}"
        raise UserError(f"{place}: {column} must be a string, and is {found}; write it as one")
    return value


def _filled(value: Any, column: str, place: str) -> str:
    if not _string(value, column, place).strip():
        raise UserError(f"{place}: {column} is empty, so there is nothing to learn; fill it in or remove the row")
    return value
