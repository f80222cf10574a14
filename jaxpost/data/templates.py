"""Chat templates: four named ones, the tokenizer's own, and substitutes for what a template does not support.

A template is one Jinja string. `jinja` sets a template's variables (`enable_thinking=False`) at its top, so that training,
sampling, the workdir and the export have the same template, and generation from the workdir needs no options.

Many templates silently leave out tools or reasoning. So each is tested with a probe: what is missing in the rendered probe is
written into the turns before they are rendered:

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

# The date for templates that print today's (Llama 3.2, SmolLM 3): training must not depend on when a run starts or resumes. It
# is the default of Llama's template.
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
    # Gemma has no system turn: its content opens the first user turn.
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
SECONDS = 10.0  # the time limit of a template for one conversation; usual ones take a thousandth
_HEADING = "Functions that may be called, one a line:"


class Unusable(UserError):
    """A template is no Jinja, or takes too long. It fails for every row, so bad_rows="skip" does not help."""


def jinja(tokenizer: Any, template: str | None = None, options: Mapping[str, Any] | None = None) -> str:
    """The Jinja of a template: a name in TEMPLATES, Jinja itself, or None for the tokenizer's own (`plain` if it has none).

    The name may also be one of a tokenizer's several templates; for None see `_of_several`. `options` are values for variables
    that the template reads; they are set at its top. Raises UserError for an unknown name and for an option that the template
    does not read.
    """
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, Mapping) else {}
    if template is None:
        text = _of_several(named) if named else tokenizer.chat_template or TEMPLATES["plain"]
    elif template in named or template in TEMPLATES:
        text = named.get(template) or TEMPLATES[template]
    elif "{" in template:
        text = template
    else:
        names = ", ".join([*named, *TEMPLATES])
        of_file = f'; of a file its text, --config.template="$(cat {template})"' if os.path.isfile(template) else ""
        raise UserError(f"chat template {template!r} is not known; give one of {names}, or a Jinja string{of_file}")
    # A saved template begins with the options of its run; new values replace them.
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
    # Jinja drops a line break after a statement; {{ '' }} keeps the template's first one.
    return top + ("{{ '' }}" if top else "") + text


def _of_several(named: Mapping[str, str]) -> str:
    """One template from a tokenizer's named ones: `default`, and `tool_use` for rows with tools, as in transformers."""
    if "default" not in named:
        names = ", ".join(named)
        raise UserError(
            f"the tokenizer has the chat templates {names}, and none is the default; choose one with config.template"
        )
    if "tool_use" not in named:
        return named["default"]
    # Jinja drops a line break at the end of a template and after a statement.
    both = [f"{{{{ '' }}}}{named[name].removesuffix(chr(10))}" for name in ("tool_use", "default")]
    return f"{{% if tools %}}{both[0]}{{% else %}}{both[1]}{{% endif %}}"


def render(
    messages: Sequence[Message], tokenizer: Any, template: str | None, generate: bool, place: str, tools: list | None = None
) -> str:
    """The messages as one string; `generate` opens the assistant's next turn.

    Raises UserError, with place, if the template refuses the messages, and Unusable if it fails for every row.
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
    except Exception as error:  # a template may raise anything
        reason = str(error) or type(error).__name__
        raise UserError(f"{place}: the chat template refuses the messages: {reason}; change them or the template") from error


def adapted(example: Conversation, tokenizer: Any, template: str | None = None) -> Conversation:
    """The conversation with what the template does not support written into the turns, and its indices adapted."""
    template = jinja(tokenizer, template)
    with_tools = example.tools or any(m["role"] == "tool" or "tool_calls" in m for m in example.messages)
    if any("reasoning_content" in m for m in example.messages) and not _knows_reasoning(
        tokenizer, template, bool(example.tools)
    ):
        example = example._replace(messages=[_thinking(message) for message in example.messages])
    # A template may support calls only if there are tools, as one made of two does.
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
    """Whether all probes are in the rendered turns. tools: whether a tool is defined."""
    return _shown(tokenizer, template, json.dumps(turns), probes, tools)


@functools.lru_cache(maxsize=64)
def _shown(tokenizer: Any, template: str, turns: str, probes: tuple[str, ...], tools: bool) -> bool:
    try:
        text = render(json.loads(turns), tokenizer, template, False, "", [_TOOL] if tools else None)
    except UserError:
        return False
    return all(probe in text for probe in probes)
