"""Chat templates: the four that are named here, the tokenizer's own, and what is done where one lacks a word for something.

A template is Jinja, and everything about it is in that one string. Variables of a template (`enable_thinking=False`) are set at
its top by `jinja`, so that what is trained, sampled, saved in the workdir and exported is the same template, and generation
from the workdir needs no option to be remembered.

Many templates know nothing of tools or of reasoning, and show that by leaving it out without a word. So they are tried on a
probe: what does not come out again of a rendered probe is written into the turns themselves before they are rendered:

    definitions   at the end of the system turn, or of a new one where the first user turn has none before it
                  "Functions that may be called, one a line:" and each as JSON on a line of its own
    a call        <tool_call>{"name": ..., "arguments": {...}}</tool_call> on a line of its own, after the turn's content
    a result      <tool_response>...</tool_response> in a user turn; results that follow each other share one
    reasoning     <think>, the thought and </think> on lines of their own, an empty line, then the turn's content

Where a template refuses system turns, the definitions open the first user turn instead.
"""

import datetime
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from jaxpost.data import clock
from jaxpost.data.formats import Conversation
from jaxpost.data.messages import Message
from jaxpost.errors import UserError

# The day that templates which print today's (Llama 3.2, SmolLM 3) are given: what a run learns must not depend on when it was
# begun, or continued. It is the one that Llama's template falls back to.
_DATE = datetime.date(2024, 7, 26)
_PARTS = "".join(f" | replace('%{code}', {_DATE.strftime(f'%{code}')!r})" for code in "dbBmyYaAHMS")
_TODAY = f"{{% macro strftime_now(form) %}}{{{{ form{_PARTS} }}}}{{% endmacro %}}{{{{ '' }}}}"

TEMPLATES = {
    "plain": (
        "{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token or '' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # Gemma has no system turn: what it would say opens the first user turn.
    "gemma": (
        "{{ bos_token or '' }}{% set lead = namespace(text='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set lead.text = m['content'] | trim + '\\n\\n' %}{% else %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
        "{{ lead.text + m['content'] | trim + '<end_of_turn>\\n' }}{% set lead.text = '' %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
}
_TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "-", "parameters": {"type": "object"}}}
# Mistral's templates want nine letters and digits.
_ID = "probe0001"
_CALL = {"id": _ID, "type": "function", "function": {"name": "probe_call", "arguments": {"at": "probe_value"}}}
SECONDS = 10.0  # that a template may take for one conversation; a usual one takes a thousandth
_HEADING = "Functions that may be called, one a line:"


class Unusable(UserError):
    """A template is no Jinja, or takes too long. It would with every row, so bad_rows="skip" does not help."""


def jinja(tokenizer: Any, template: str | None = None, options: Mapping[str, Any] | None = None) -> str:
    """The Jinja of a template: a name in TEMPLATES, Jinja itself, or None for the tokenizer's own (`plain` where it has none).

    Of a tokenizer with several templates the name may be one of theirs; see `_of_several` for what None is then.
    `options` are values for variables that the template reads; they are set at its top.
    Raises UserError for a name that is not in TEMPLATES and for an option that the template does not read.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, Mapping) else {}
    if template is None:
        text = _of_several(own) if own else tokenizer.chat_template or TEMPLATES["plain"]
    elif template in own or template in TEMPLATES:
        text = own.get(template) or TEMPLATES[template]
    elif "{" in template:
        text = template
    else:
        known = ", ".join([*own, *TEMPLATES])
        of_file = f'; of a file its text, --config.template="$(cat {template})"' if os.path.isfile(template) else ""
        raise UserError(f"chat template {template!r} is not known; give one of {known}, or a Jinja string{of_file}")
    # A saved template begins with the options that its run had; new values take their place.
    top = ""
    if options and (held := re.match(r"((?:\{% set \w+ = .*? %\})+)\{\{ '' \}\}", text, re.DOTALL)):
        text = text[held.end() :]
        top = "".join(m[0] for m in re.finditer(r"\{% set (\w+) = .*? %\}", held[1], re.DOTALL) if m[1] not in options)
    for name, value in (options or {}).items():
        if not (name.isidentifier() and re.search(rf"\b{name}\b", text)):
            raise UserError(f"config.template_options: the chat template reads no variable {name!r}; leave it out")
        if not isinstance(value, (bool, int, float, str)):
            raise UserError(f"config.template_options.{name}: {value!r}; give true or false, a number or a string")
        top += f"{{% set {name} = {json.dumps(value)} %}}"
    # A line break after a statement is swallowed, and the template's own first one must not be.
    return top + ("{{ '' }}" if top else "") + text


def _of_several(own: Mapping[str, str]) -> str:
    """One template of a tokenizer's named ones: `default`, and `tool_use` for rows with tools, as transformers chooses."""
    if "default" not in own:
        names = ", ".join(own)
        raise UserError(
            f"the tokenizer has the chat templates {names}, and none is the default; choose one with config.template"
        )
    if "tool_use" not in own:
        return own["default"]
    # A line break at the end of a template is swallowed, and so is one after a statement.
    both = [f"{{{{ '' }}}}{own[name].removesuffix(chr(10))}" for name in ("tool_use", "default")]
    return f"{{% if tools %}}{both[0]}{{% else %}}{both[1]}{{% endif %}}"


def render(
    messages: Sequence[Message], tokenizer: Any, template: str | None, generate: bool, place: str, tools: list | None = None
) -> str:
    """The messages as one string; `generate` opens the assistant's next turn. Raises UserError, with place, if it cannot be.

    Where the template itself is at fault, whatever the row, the error is Unusable.
    """
    template = jinja(tokenizer, template)
    template = _TODAY + template if "strftime_now" in template else template
    options = {"tools": tools, "chat_template": template, "tokenize": False, "add_generation_prompt": generate}
    try:
        return clock.within(SECONDS, functools.partial(tokenizer.apply_chat_template, list(messages), **options))
    except TimeoutError as error:
        raise Unusable(f"{place}: the chat template {error}; it does not seem to end: use another template") from error
    except jinja2.TemplateSyntaxError as error:
        reason = f"by its line {error.lineno}: {error}"
        raise Unusable(f"the chat template is no Jinja, {reason}; mend it, or use another") from error
    except Exception as error:  # a template is somebody's program, and may raise anything
        reason = str(error) or type(error).__name__
        raise UserError(f"{place}: the chat template refuses the messages: {reason}; change them or the template") from error


def adapted(example: Conversation, tokenizer: Any, template: str | None = None) -> Conversation:
    """The conversation with whatever the template has no word for written into the turns; its counts follow suit."""
    template = jinja(tokenizer, template)
    with_tools = example.tools or any(m["role"] == "tool" or "tool_calls" in m for m in example.messages)
    if any("reasoning_content" in m for m in example.messages) and not _knows_reasoning(
        tokenizer, template, bool(example.tools)
    ):
        example = example._replace(messages=[_thinking(message) for message in example.messages])
    # A template may know calls only where there are tools, as two in one do.
    if not with_tools or all(_knows_tools(tokenizer, template, tools) for tools in {True, bool(example.tools)}):
        return example
    written, places, numbers = [], [], []
    for before, message in zip([{}, *example.messages], example.messages, strict=False):
        turn = _without_tools(message)
        if message["role"] == "tool" == before.get("role"):
            written[-1] = turn | {"content": f"{written[-1]['content']}\n{turn['content']}"}
        else:
            written.append(turn)
            numbers.append(len(places) + 1)
        places.append(len(written) - 1)
    whole = _introduced(written, example.tools, _knows_system(tokenizer, template)) if example.tools else written
    added = len(whole) - len(written)
    prompt = None if example.prompt is None else places[example.prompt] + added
    untrained = tuple(places[i] + added for i in example.untrained)
    return Conversation(whole, example.place, prompt, None, untrained, (*[0] * added, *numbers))


def _introduced(messages: list[Message], tools: list, system: bool) -> list[Message]:
    """The messages with the tools' definitions before the first user turn."""
    lines = "\n".join([_HEADING, *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)])
    first, *rest = messages
    if first["role"] == "system":
        return [first | {"content": f"{first['content']}\n\n{lines}"}, *rest]
    if system:
        return [{"role": "system", "content": lines}, *messages]
    return [first | {"content": f"{lines}\n\n{first['content']}"}, *rest]


def _thinking(message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    others = {key: value for key, value in message.items() if key != "reasoning_content"}
    return others | {"content": f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"}


def _without_tools(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>{message['content']}</tool_response>"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    if not calls:
        return message
    lines = [message["content"]] if message["content"] else []
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return kept | {"content": "\n".join(lines + [f"<tool_call>{call}</tool_call>" for call in calls])}


def _knows_tools(tokenizer: Any, template: str, tools: bool) -> bool:
    question = {"role": "user", "content": "-"}
    turns = [
        question,
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "name": "probe_call", "tool_call_id": _ID, "content": "probe_result"},
        {"role": "assistant", "content": "-"},
    ]
    probes = ("probe_call", "probe_value", "probe_result", *(["probe_tool"] if tools else []))
    return _shows(tokenizer, template, turns, probes, tools)


def _knows_reasoning(tokenizer: Any, template: str, tools: bool) -> bool:
    question = {"role": "user", "content": "-"}
    answer = {"role": "assistant", "content": "-", "reasoning_content": "probe_thought"}
    return _shows(tokenizer, template, [question, answer], ("probe_thought",), tools)


def _knows_system(tokenizer: Any, template: str) -> bool:
    turns = [{"role": role, "content": f"probe_{role}"} for role in ("system", "user", "assistant")]
    return _shows(tokenizer, template, turns, ("probe_system",))


def _shows(tokenizer: Any, template: str, turns: list[Message], probes: tuple[str, ...], tools: bool = False) -> bool:
    """Whether all probes come out of the rendered turns, which have a tool or not."""
    return _shown(tokenizer, template, json.dumps(turns), probes, tools)


@functools.lru_cache(maxsize=64)
def _shown(tokenizer: Any, template: str, turns: str, probes: tuple[str, ...], tools: bool) -> bool:
    try:
        text = render(json.loads(turns), tokenizer, template, False, "", [_TOOL] if tools else None)
    except UserError:
        return False
    return all(probe in text for probe in probes)
