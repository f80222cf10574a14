"""Checks that a chat template renders everything that the turns hold.

A template may leave out what it does not know: a thought (`content.split('</think>')[-1]`), the text beside a tool call, a
system turn. Only a comparison with the rendered text shows that. White space is ignored, since templates trim, and a text may
be in JSON's spelling, since templates use `tojson`. Each part of a turn needs its own place in the text: the answer "No" does
not match inside the argument "Norway". The longest part is matched first, so that none takes another's place.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from jaxpost.data.messages import Message
from jaxpost.errors import UserError

_OPEN, _CLOSE = "<think>", "</think>"
# Switches in a prompt that templates act on and remove (Qwen 3, SmolLM 3).
_SWITCHES = re.compile(r"/(?:no_)?think\b|/system_override\b")

_PYTHON = {"true": "True", "false": "False", "null": "None"}

Part = tuple[str, str]  # a name for messages, the text


def left_out(message: Message, text: str) -> str | None:
    """The name of a part of an assistant's turn that is missing in its rendered text; None if nothing is."""
    alone = not (message.get("reasoning_content") or message.get("tool_calls"))
    if alone and message["content"].strip() in text:
        return None
    lost = first_left_out([message], text)
    return lost[1] if lost else None


def first_left_out(messages: Sequence[Message], text: str) -> tuple[int, str] | None:
    """(index, part): the first of the assistant's turns with a part missing in their joint text; None if nothing is."""
    rest = whole = _squashed(text)
    parts = [(turn, name, part) for turn, message in enumerate(messages) for name, part in _parts(message, whole)]
    missing = set()
    # Of equal parts the later turn's is matched first: templates leave out earlier ones.
    for turn, name, part in sorted(parts, key=lambda part: (len(_squashed(part[2])), part[0]), reverse=True):
        spelling = next((spelling for spelling in _spellings(part) if spelling in rest), None)
        if spelling is None:
            missing.add((turn, name))
        else:
            rest = rest.replace(spelling, "\0", 1)
    return next(((turn, name) for turn, name, _ in parts if (turn, name) in missing), None)


def check_prompt(messages: Sequence[Message], tools: list[dict[str, Any]] | None, text: str, numbers, place: str) -> None:
    """Raises UserError if the rendered text lacks the content of a turn other than the assistant's, or a tool's name.

    numbers: each message's number in the row; 0 for one that is not in the row.
    """
    whole = None
    for message, number in zip(messages, numbers, strict=True):
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str) or content.strip() in text:
            continue
        whole = whole or _squashed(_SWITCHES.sub("", text))
        if not any(spelling in whole for spelling in _spellings(_SWITCHES.sub("", content))):
            role, where = message["role"], f"{place}, message {number}" if number else place
            raise UserError(
                f"{where}: the chat template leaves out what the {role} says; use another template (config.template)"
                + (", or say it in the first user turn" if role == "system" else "")
            )
    for tool in tools or ():
        if tool["function"]["name"] not in text:
            raise UserError(
                f"{place}: the chat template leaves out the tool {tool['function']['name']!r}; use another template"
                " (config.template), or take the row's tools out"
            )


def content_end(content: str, text: str) -> int:
    """The end of a turn's content in its rendered text; 0 if it is not there verbatim."""
    content = content.strip()
    for tail in (content, content.rpartition(_CLOSE)[2].strip(), content.rpartition("\n")[2]):
        if tail and (start := text.find(tail)) >= 0:
            return start + len(tail)
    return 0


def _parts(message: Message, text: str) -> list[Part]:
    """The parts of an assistant's turn. What the squashed text has in one piece is one part, else it is split."""
    content = message["content"]
    parts = [("the thought", message.get("reasoning_content", ""))]
    if _CLOSE not in content or _squashed(content) in text:
        parts.append(("the content", content))
    else:
        *thoughts, answer = content.split(_CLOSE)
        parts += [("the thought", thought.replace(_OPEN, "", 1)) for thought in thoughts]
        parts += [(f"{_CLOSE} after the thought", _CLOSE), ("the content", answer)]
    for call in message.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        written = [(f"the arguments of the call of {name!r}", json.dumps(arguments, ensure_ascii=False))]
        if not any(spelling in text for spelling in _spellings(written[0][1])):
            written = [
                (f"the argument {key!r} of the call of {name!r}", leaf) for key in arguments for leaf in _leaves(arguments[key])
            ]
        parts += [(f"the call of {name!r}", name), *(written if arguments else ())]
    return [part for part in parts if part[1].strip()]


def _leaves(value: Any) -> list[str]:
    """The strings, numbers and so on in an argument."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value if isinstance(value, str) else json.dumps(value)]


def _spellings(text: str) -> list[str]:
    """The spellings of a text: verbatim, in JSON and in Python, without white space."""
    text = text.strip()
    quoted = (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text))
    return [_squashed(text), *(_squashed(string[1:-1]) for string in quoted), *([_PYTHON[text]] if text in _PYTHON else [])]


def _squashed(text: str) -> str:
    return "".join(text.split())
