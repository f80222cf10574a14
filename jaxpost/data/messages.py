"""Conversations in one format, which all formats of data sets are converted to:

    {"role": "system" | "user" | "assistant" | "tool", "content": str}

A message may also have `reasoning_content` (the assistant's thought), `tool_calls` (a list of {"type": "function", "function":
{"name", "arguments": {...}}}), `name` and `tool_call_id` (of a tool's turn), and on an assistant's turn `weight`: 0 if the row
says not to learn it. Data sets use several keys for thoughts, calls, a call's arguments and the weight (_THOUGHTS, _CALLS,
_ARGUMENTS, _MARKS). Other keys with text are refused, unless they only describe the turn.

The formats are OpenAI's (role and content, maybe a list of parts), ShareGPT's (from and value; human, gpt, system,
function_call, observation) and HH-RLHF's transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ..."), where consecutive turns of one
speaker are one turn.

`check` has the rules of sequence: an optional system turn, then user and assistant alternate, and tools answer an assistant's
calls before its next turn. The checks are strict: an empty assistant turn or two user turns in a row is a defect of the data
that would otherwise be learned.
"""

import json
import re
from typing import Any

from jaxpost.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
# The keys of data sets for a thought, calls, a call's arguments, and whether a turn is learned.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
_CALLS = ("tool_calls", "function_call")
_ARGUMENTS = ("arguments", "parameters", "input", "args")
_MARKS = ("weight", "loss_weight", "loss", "train", "training", "trainable")
_READ = frozenset({"role", "from", "content", "name", "tool_call_id", *_THOUGHTS, *_CALLS, *_MARKS})
# axolotl's marks of learned parts of a turn.
_UNSUPPORTED = ("train_detail", "training_detail")
# Keys that describe a turn and are no part of it.
_ABOUT = frozenset(
    [
        *(
            "id",
            "message_id",
            "turn_id",
            "parent_id",
            "conversation_id",
            "openai_id",
            "uuid",
            "turn_identifier",
            "index",
            "hash",
        ),
        *(
            "hashed_ip",
            "header",
            "state",
            "country",
            "language",
            "lang",
            "model",
            "model_name",
            "source",
            "dataset",
            "category",
        ),
        *("topic", "task", "type", "tag", "tags", "label", "labels", "score", "scores", "rating", "ratings", "author", "usage"),
        *(
            "created",
            "created_at",
            "timestamp",
            "date",
            "time",
            "annotations",
            "metadata",
            "meta",
            "finish_reason",
            "stop_reason",
        ),
    ]
)
_SPEECH = re.compile(r"\n\n(Human|Assistant):")


def turns(value: Any, column: str, place: str) -> list[Message]:
    """The messages of a column that holds a list of turns, a single turn, or a transcript.

    Raises UserError with the place and the number of the turn for anything else. Does not check the sequence.
    """
    if isinstance(value, str) and _SPEECH.match(value):
        return _transcript(value)
    if isinstance(value, dict):
        lengths = {len(part) if isinstance(part, list) else -1 for part in value.values()}
        # TFDS gives a sequence of structures as a structure of sequences.
        together = len(lengths) == 1 and -1 not in lengths
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)] if together else [value]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"{place}: {column} must be a list of objects with role and content (or from and value); write it so")
    return [_turn(turn, f"{place}, message {number}") for number, turn in enumerate(value, start=1)]


def check(messages: list[Message], place: str, empty: bool = False) -> list[Message]:
    """The messages. Raises UserError with the place and the turn if their sequence breaks the rules.

    empty: whether the last assistant turn may be empty, as a rejected answer may.
    """
    expected = ("user",)
    for number, message in enumerate(messages, start=1):
        where = f"{place}, message {number}"
        role = message["role"]
        if role == "system":
            if number > 1:
                raise UserError(f"{where}: a system turn must be first; move it there or fold it into the user's turn")
            continue
        if role == "tool" and role not in expected:
            raise UserError(f"{where}: a tool's turn without a call before it; an assistant's tool_calls must come first")
        if role not in expected:
            rule = "the tools that were called answer first" if "tool" in expected else "user and assistant must alternate"
            raise UserError(f"{where}: the role is {role}, not {' or '.join(expected)}; {rule}, user first")
        calls = message.get("tool_calls")
        if role == "assistant" and not (message["content"].strip() or calls or (empty and number == len(messages))):
            raise UserError(
                f"{where}: content of the assistant's turn is empty, so there is nothing to learn; fill it in or remove the row"
            )
        after = {"user": ("assistant",), "tool": ("tool", "assistant"), "assistant": ("tool",) if calls else ("user",)}
        expected = after[role]
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise UserError(f"{place}: a conversation without a user turn; add one")
    if "assistant" not in roles:
        raise UserError(f"{place}: a conversation without an assistant turn leaves nothing to learn; add one or remove the row")
    return messages


def has_calls(value: Any) -> bool:
    """Whether a row's column has a tool call, in any format."""
    if isinstance(value, list):
        return any(map(has_calls, value))
    if not isinstance(value, dict):
        return False
    written = value.get("from") == "function_call" or value.get("type") == "tool_call"
    return written or any(value.get(key) for key in _CALLS) or any(map(has_calls, value.values()))


def assistant(text: str) -> list[Message]:
    """One assistant turn."""
    return [{"role": "assistant", "content": text}]


def unweighted(messages: list[Message]) -> list[Message]:
    """The messages without their weights."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def definitions(value: Any, place: str) -> list[dict[str, Any]] | None:
    """The functions in a row's `tools` column, each {"type": "function", "function": {"name", ...}}; None if none.

    The column is a list, or JSON of one, of such objects or of their inner `function`. Raises UserError with the place
    otherwise.
    """
    if isinstance(value, str) and value.strip():
        value = _json(value, "tools", place)
    if value is None or value == "" or value == []:
        return None
    listed = value if isinstance(value, list) else [None]
    functions = [isinstance(tool, dict) and (tool.get("function") or tool) for tool in listed]
    if not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in functions):
        raise UserError(
            f"{place}: tools must be a list of functions, each an object with a name; write it so, or as [] if none"
        )
    return [{"type": "function", "function": tool} for tool in functions]


def string(value: Any, column: str, place: str) -> str:
    """The value. Raises UserError with the place if it is no string."""
    if isinstance(value, bytes):
        raise UserError(f"{place}: {column} is bytes that are no UTF-8; only text can be learned, so store it as UTF-8")
    if not isinstance(value, str):
        kind = "missing or null" if value is None else f"of type {type(value).__name__}"
        raise UserError(f"{place}: {column} must be a string, and is {kind}; write it as one")
    return value


def filled(value: Any, column: str, place: str) -> str:
    """The value. Raises UserError with the place if it is no string, or only white space."""
    if not string(value, column, place).strip():
        raise UserError(f"{place}: {column} is empty, so there is nothing to learn; fill it in or remove the row")
    return value


def _transcript(text: str) -> list[Message]:
    parts = _SPEECH.split(text)[1:]
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content.strip()
        else:
            messages.append({"role": role, "content": content.strip()})
    return messages


def _turn(turn: dict[str, Any], where: str) -> Message:
    fields = {key: value for key, value in turn.items() if value is not None}
    if "role" not in fields and "from" in fields:
        fields = _from_sharegpt(fields, where)
    # OpenAI's first format of calls has a role for the function that answers.
    role = "tool" if fields.get("role") == "function" else fields.get("role")
    if role not in ROLES:
        remedy = "write it as system" if role == "developer" else "write it as one of these, or remove the row"
        raise UserError(f"{where}: role {role!r} is not supported; the roles are {', '.join(ROLES)}; {remedy}")
    _check_keys(fields, where)
    content, thought, calls = _content(fields.get("content"), any(fields.get(key) for key in _CALLS), where)
    thoughts = [thought, *(string(fields.get(key) or "", key, where) for key in _THOUGHTS)]
    called = [calls, *(_calls(fields.get(key) or [], where) for key in _CALLS)]
    thought = _only(thoughts, "thoughts", where) or ""
    calls = _only(called, "tool calls", where) or []
    if (thought or calls) and role != "assistant":
        raise UserError(f"{where}: reasoning and tool calls belong to the assistant, not to the {role}; move them")
    message = {"role": role, "content": content}
    message |= {"reasoning_content": thought} if thought else {}
    message |= {"tool_calls": calls} if calls else {}
    if role == "tool":
        message |= {key: string(fields[key], key, where) for key in ("name", "tool_call_id") if key in fields}
    if role == "assistant" and not _is_learned(fields, where):
        message["weight"] = 0
    return message


def _check_keys(fields: dict[str, Any], where: str) -> None:
    """Raises UserError for a key with text that is not read: its text would be lost."""
    for key, value in fields.items():
        if key in _UNSUPPORTED or (key not in _READ and key not in _ABOUT and _has_text(value)):
            raise UserError(
                f"{where}: the key {key!r} of a turn is not read, so what it holds would be lost; write its text under content"
                " (a thought under reasoning_content, calls under tool_calls), or remove the key"
            )


def _has_text(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return any(map(_has_text, value)) if isinstance(value, list) else isinstance(value, str) and bool(value.strip())


def _only(values: list, what: str, where: str) -> Any:
    """The value that is not empty; None if all are. Raises UserError if several differ."""
    values = [value for value in values if value]
    if any(value != values[0] for value in values):
        raise UserError(f"{where}: {what} are given in two places and differ; write them once")
    return values[0] if values else None


def _is_learned(fields: dict[str, Any], where: str) -> bool:
    for key in _MARKS:
        if key in fields and fields[key] not in (0, 1):
            raise UserError(f"{where}: {key} {fields[key]!r}; a turn is learned (1) or not (0), so give one of these")
    return all(fields.get(key, 1) for key in _MARKS)


def _from_sharegpt(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """A turn of ShareGPT's under the keys of OpenAI's."""
    speaker = fields["from"]
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"{where}: from {speaker!r} is not supported; the speakers are {', '.join(_SPEAKERS)}")
    kept = {key: value for key, value in fields.items() if key not in ("from", "value")}
    if "value" not in fields and any(fields.get(key) for key in _CALLS):
        return kept | {"role": role}
    value, target = string(fields.get("value"), "value", where), "content"
    if speaker == "function_call":
        value, target = _json(value, "a function_call", where), "function_call"
    if target in kept:
        raise UserError(f"{where}: value and {target} are both given; write the turn's text once")
    return {"content": ""} | kept | {"role": role, target: value}


def _content(value: Any, calls: bool, where: str) -> tuple[str, str, list]:
    """(text, thought, tool calls) of a content: a string, or a list of parts, which are joined."""
    if value is None and calls:
        return "", "", []
    if not isinstance(value, list):
        return string(value, "content", where), "", []
    texts, thoughts, called = [], [], []
    for part in value:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "reasoning", "thinking", "tool_call"):
            raise UserError(f"{where}: a part of type {kind!r}; content is text alone, so remove the part or the row")
        text = string(next((part[key] for key in ("text", "value", kind) if part.get(key) is not None), None), kind, where)
        if kind == "tool_call":
            called.append(_json(text, "a tool_call", where))
        else:
            (texts if kind == "text" else thoughts).append(text)
    return "".join(texts), "".join(thoughts), _calls(called, where)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls, each {"type", "function": {"name", "arguments"}}, and "id" where it has one; arguments as an object."""
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise UserError(f"{where}: tool_calls must be a list, each with a name and arguments; write them so")
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = (call.get("function") or {}) if isinstance(call, dict) else None
    stated = call | function if isinstance(function, dict) else {}
    stated = {key: value for key, value in stated.items() if key != "function" and value is not None}
    if not isinstance(stated.get("name"), str):
        raise UserError(f"{where}: a tool call must be an object with a name and arguments; write it so")
    if unread := [key for key in stated if key not in ("id", "type", "index", "name", *_ARGUMENTS)]:
        raise UserError(
            f"{where}: a tool call has the key {unread[0]!r}, which is not read; its keys are name, {', '.join(_ARGUMENTS)}"
            " (one of these, an object) and id"
        )
    arguments = _only([_arguments(stated.get(key), where) for key in _ARGUMENTS], "a call's arguments", where) or {}
    kept = {"id": str(stated["id"])} if isinstance(stated.get("id"), (str, int)) else {}
    return kept | {"type": "function", "function": {"name": stated["name"], "arguments": arguments}}


def _arguments(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str) and value.strip():
        value = _json(value, "a call's arguments", where)
    value = {} if value is None or value == [] or (isinstance(value, str) and not value.strip()) else value
    if not isinstance(value, dict):
        raise UserError(f"{where}: a call's arguments must be an object of names and values; write them so")
    return value


def _json(text: str, what: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {what} is broken JSON ({error}); mend it or remove the row") from error
