"""Chat templates: the named ones spelled out, variables set once for all, and what is written where a template lacks a word.

Every expected value is the whole rendered text with the mask in it: what a tool answered is never learned, what the assistant
calls always is.
"""

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from toy_tokenizers import byte_pairs, characters, conversation, learned

from jaxpost.data import chat, clock, encoding, templates
from jaxpost.data.formats import Conversation
from jaxpost.data.readers import Record
from jaxpost.errors import UserError
from jaxpost.tokenizer import load

SYSTEM = {"role": "system", "content": "be"}
FUNCTION = {"name": "f", "description": "d"}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
TOOL_TALK = Conversation(
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "wait", "tool_calls": [CALL, CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "7"},
        {"role": "tool", "content": "8"},
        {"role": "assistant", "content": "15"},
    ],
    "p",
    None,
    TOOLS,
)
# One that knows tools and reasoning, in a manner of its own.
CAPABLE = (
    "{% if tools %}<|im_start|>tools{% for t in tools %} {{ t.function.name }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.values() | list | first }}]"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shown(talk, tokenizer, template=None, train_on="assistant"):
    return learned(chat.encode(talk, tokenizer, template, train_on), tokenizer)


def with_tokens(*tokens):
    tokenizer = byte_pairs()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens), "bos_token": "<bos>"})
    return tokenizer


TALK = Conversation([SYSTEM, *conversation(" a ", "b", "c", "d")], "p")


def test_llama3():
    tokenizer = with_tokens("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def turn(role, content):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}"

    expected = "<bos>" + turn("system", "be<|eot_id|>") + turn("user", "a<|eot_id|>") + turn("assistant", "⟦b<|eot_id|>⟧")
    expected += turn("user", "c<|eot_id|>") + turn("assistant", "⟦d<|eot_id|>⟧")
    assert shown(TALK, tokenizer, "llama3") == expected
    assert chat.stop_ids(tokenizer, "llama3")[1:] == (tokenizer.convert_tokens_to_ids("<|eot_id|>"),)


def test_gemma_folds_the_system_turn_into_the_first_user_turn():
    tokenizer = with_tokens("<start_of_turn>", "<end_of_turn>")
    expected = (
        "<bos><start_of_turn>user\nbe\n\na<end_of_turn>\n<start_of_turn>model\n⟦b<end_of_turn>⟧\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n⟦d<end_of_turn>⟧\n"
    )
    assert shown(TALK, tokenizer, "gemma") == expected
    assert shown(Conversation(TALK.messages[1:], "p"), tokenizer, "gemma") == expected.replace("be\n\n", "")
    assert chat.stop_ids(tokenizer, "gemma")[1:] == (tokenizer.convert_tokens_to_ids("<end_of_turn>"),)


def test_turns_of_weight_0_are_not_learned():
    talk = Conversation(conversation("a", "b", "c", "d"), "p", untrained=(1,))
    assert shown(talk, characters()) == "<s>a\nb</s>c\n⟦d</s>⟧"
    assert shown(talk, characters(), train_on="last") == "<s>a\nb</s>c\n⟦d</s>⟧"
    assert not chat.encode(talk._replace(untrained=(1, 3)), characters())["mask"].any()
    assert not chat.encode(talk._replace(untrained=(3,)), characters(), train_on="last")["mask"].any()


def test_a_template_that_knows_tools_and_reasoning_writes_them_itself():
    tokenizer = byte_pairs(CAPABLE)
    expected = (
        "<|im_start|>tools f<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦(hm)wait[f é][f é]<|im_end|>⟧\n"
        "<|im_start|>tool\n7<|im_end|>\n<|im_start|>tool\n8<|im_end|>\n<|im_start|>assistant\n⟦15<|im_end|>⟧\n"
    )
    assert shown(TOOL_TALK, tokenizer) == expected


def test_what_a_template_does_not_know_is_written_into_the_turns():
    talk = TOOL_TALK._replace(untrained=(4,), prompt=4)
    call = '<tool_call>{"name": "f", "arguments": {"x": "é"}}</tool_call>'
    said = f"⟦<think>\nhm\n</think>\n\nwait\n{call}\n{call}<|im_end|>⟧"
    middle = (
        f"<|im_start|>assistant\n{said}\n<|im_start|>user\n<tool_response>7</tool_response>\n<tool_response>8</tool_response>"
    )
    listed = 'Functions that may be called, one a line:\n{"name": "f", "description": "d"}'
    start = f"<|im_start|>system\n{listed}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
    end = "<|im_end|>\n<|im_start|>assistant\n15<|im_end|>\n"
    assert shown(talk, byte_pairs(), "chatml") == start + middle + end
    adapted = templates.adapted(talk, byte_pairs(), "chatml")
    assert (adapted.prompt, adapted.untrained, adapted.tools) == (4, (4,), None)
    assert [m["role"] for m in adapted.messages] == ["system", "user", "assistant", "user", "assistant"]
    own = templates.adapted(talk._replace(messages=[SYSTEM, *talk.messages], untrained=(5,), prompt=5), byte_pairs(), "chatml")
    assert own.messages[0]["content"] == f"be\n\n{listed}" and (own.prompt, own.untrained) == (4, (4,))
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + templates.TEMPLATES["chatml"]
    folded = templates.adapted(talk, byte_pairs(refusing))
    assert folded.messages[0] == {"role": "user", "content": f"{listed}\n\nq"} and (folded.prompt, folded.untrained) == (
        3,
        (3,),
    )
    plain = Conversation(conversation("a", "b"), "p")
    assert templates.adapted(plain, byte_pairs(), "chatml") is plain


THINKING = templates.TEMPLATES["chatml"].replace(
    "assistant\\n' }}{% endif %}",
    "assistant\\n' }}{% if not (enable_thinking | default(true)) %}<think></think>{% endif %}{% endif %}",
)


def test_options_are_set_in_the_template_itself():
    tokenizer, asked = byte_pairs(THINKING), conversation("a")
    off = templates.jinja(tokenizer, None, {"enable_thinking": False})
    for template, option in ((None, {}), (off, {"enable_thinking": False})):
        theirs = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **option)
        assert templates.render(asked, tokenizer, template, True, "p") == theirs
        assert theirs.endswith("<think></think>") == bool(option)
    assert templates.jinja(tokenizer, off) == off
    assert templates.jinja(tokenizer, "\n{{ x }}{{ y }}", {"x": 'a"\n', "y": 1.5}).endswith("{{ '' }}\n{{ x }}{{ y }}")
    top = templates.jinja(tokenizer, "\n{{ x }}{{ y }}", {"x": 'a"\n', "y": 1.5})
    assert templates.render(asked, tokenizer, top, False, "") == '\na"\n1.5'
    with pytest.raises(UserError, match="template_options: the chat template reads no variable 'enable_thinkin'; leave it out"):
        templates.jinja(tokenizer, None, {"enable_thinkin": False})
    with pytest.raises(UserError, match="template_options.enable_thinking: None; give true or false, a number or a string"):
        templates.jinja(tokenizer, None, {"enable_thinking": None})


def test_a_switch_of_thinking_changes_what_must_be_learned():
    talk = Conversation(conversation("a", "<think></think>b"), "p")
    tokenizer = byte_pairs(THINKING)
    off = templates.jinja(tokenizer, None, {"enable_thinking": False})
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert shown(talk, tokenizer) == start + "⟦<think></think>b<|im_end|>⟧\n"
    assert shown(talk, tokenizer, off) == start + "<think></think>⟦b<|im_end|>⟧\n"


def test_new_options_take_the_place_of_those_a_saved_template_begins_with():
    text = characters()
    text.chat_template = (
        "{% if on %}yes{% else %}no{% endif %}{{ size }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    text.chat_template = templates.jinja(text, None, {"on": False, "size": 3})
    turns = conversation("a", "b")
    assert templates.render(turns, text, None, False, "p").startswith("no3")
    again = templates.jinja(text, None, {"on": True})
    assert templates.render(turns, text, again, False, "p").startswith("yes3")
    assert again.count("set on") == 1


def test_a_template_that_prints_the_date_prints_the_same_every_day():
    text = characters()
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert templates.render(conversation("a", "b"), text, template, False, "p").startswith("26 Jul 2024")


# ---- templates that come with names, and calls that need ids

NINE = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'tool' %}{{ raise_exception('ids have nine characters') if m.tool_call_id | length != 9 }}"
    "[TOOL_RESULTS]{{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/TOOL_RESULTS]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def with_ids(number):
    ask, call, result, _, answer = TOOL_TALK.messages
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": number, **CALL}]}
    return Conversation([ask, call, {**result, "tool_call_id": number}, answer], "p", None, TOOLS)


def test_ids_of_calls_reach_a_template_that_wants_them():
    tokenizer = byte_pairs(NINE)
    expected = (
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "f", "description": "d"}}][/AVAILABLE_TOOLS]'
        "[INST] q[/INST]"
        '⟦[TOOL_CALLS]{"name": "f", "arguments": {"x": "é"}, "id": "aB3dE6gH9"}<|endoftext|>⟧'
        '[TOOL_RESULTS]{"content": "7", "call_id": "aB3dE6gH9"}[/TOOL_RESULTS]⟦ 15<|endoftext|>⟧'
    )
    assert shown(with_ids("aB3dE6gH9"), tokenizer) == expected
    with pytest.raises(UserError, match="p: the chat template refuses the messages: ids have nine characters"):
        chat.encode(with_ids("call_1"), tokenizer)


def test_a_tokenizer_of_several_templates_takes_the_default_one_and_for_tools_that_of_tools():
    default = "\n" + templates.TEMPLATES["chatml"] + "\n"
    tokenizer = byte_pairs({"default": default, "tool_use": CAPABLE, "rag": "RAG" + templates.TEMPLATES["chatml"]})
    turns = conversation("a", "b")
    for tools in (None, TOOLS):
        theirs = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
        assert templates.render(turns, tokenizer, None, False, "p", tools) == theirs
    assert "<|im_start|>tools f<|im_end|>" in theirs
    assert templates.render(turns, tokenizer, "rag", False, "p", TOOLS).startswith("RAG<|im_start|>user")
    assert templates.jinja(tokenizer, "tool_use") == CAPABLE
    assert "(hm)wait[f é][f é]<|im_end|>⟧" in shown(TOOL_TALK, tokenizer), "calls as that template has them"
    assert "<tool_call>" in shown(TOOL_TALK._replace(tools=None), tokenizer), "the default one knows no calls"
    with pytest.raises(
        UserError, match="chat template 'tools' is not known; give one of default, tool_use, rag, plain, chatml"
    ):
        templates.jinja(tokenizer, "tools")
    for names in (["rag"], ["tool_use", "rag"]):
        others = byte_pairs(dict.fromkeys(names, CAPABLE))
        with pytest.raises(
            UserError, match=f"has the chat templates {', '.join(names)}, and none is the default; choose one with"
        ):
            templates.jinja(others)
        assert templates.jinja(others, "rag") == CAPABLE


def test_named_templates_are_read_from_files_and_from_a_list(tmp_path):
    byte_pairs({"default": templates.TEMPLATES["chatml"], "rag": "RAG"}).save_pretrained(tmp_path / "files")
    assert (tmp_path / "files/additional_chat_templates/rag.jinja").exists()
    byte_pairs().save_pretrained(tmp_path / "list")
    file = tmp_path / "list/tokenizer_config.json"
    both = [{"name": "default", "template": templates.TEMPLATES["chatml"]}, {"name": "rag", "template": "RAG"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": both}))
    for folder in ("files", "list"):
        tokenizer = load(tmp_path / folder)
        assert templates.jinja(tokenizer) == templates.TEMPLATES["chatml"] and templates.jinja(tokenizer, "rag") == "RAG"


RAISING = {
    "a division by zero": "{% set x = 1 / (messages | length - 2) %}",
    "endless recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{% if messages | length == 2 %}{{ f(0) }}{% endif %}",
    "a missing key": "{% if messages | length == 2 %}{{ messages[7]['content'] }}{% endif %}",
    "an overflow": "{% if messages | length == 2 %}{{ 'a'.center(10 ** 30) }}{% endif %}",
    "a wrong type": "{% if messages | length == 2 %}{{ 1 + 'a' }}{% endif %}",
}
TURNS = "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '|' }}{% endfor %}"


@pytest.mark.parametrize("kind", RAISING)
def test_a_template_that_raises_names_the_row_and_obeys_bad_rows(kind):
    tokenizer, template = byte_pairs(), TURNS + RAISING[kind]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [Record({"messages": turns * (1 if i == 1 else 2)}, f"x.jsonl, line {i + 1}") for i in range(3)]
    with pytest.raises(UserError, match="x.jsonl, line 2: the chat template refuses the messages: .+; change them"):
        encoding.encode_all(records, tokenizer, template, "last", window=64)
    encoded = encoding.encode_all(records, tokenizer, template, "last", window=64, bad_rows="skip")
    assert encoded.report["count"] == 2 and encoded.report["skipped"] == 1 and "x.jsonl, line 2: " in encoded.reason


def test_a_template_that_is_no_jinja_is_at_fault_itself_and_of_a_file_its_text_is_asked_for(tmp_path):
    record = Record({"messages": conversation("a", "b")}, "x.jsonl, line 1")
    cases = (("{% for m in messages %}\n{{ m }", "line 2: unexpected '}'"), ("{{ 1|nope }}", "line 1: No filter"))
    for broken, reason in cases:
        with pytest.raises(templates.Unusable, match=f"^the chat template is no Jinja, by its {reason}"):
            encoding.encode_all([record], byte_pairs(), broken, "last", window=64, bad_rows="skip")
    (file := tmp_path / "mine.jinja").write_text(TURNS)
    with pytest.raises(UserError, match=r'give one of .+; of a file its text, --config.template="\$\(cat .+mine.jinja\)"'):
        templates.jinja(byte_pairs(), str(file))


ENDLESS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
)


@pytest.mark.parametrize("template", ENDLESS)
@pytest.mark.parametrize("thread", ["main", "other"])
def test_an_endless_template_is_stopped_in_any_thread_whatever_bad_rows_says(monkeypatch, template, thread):
    monkeypatch.setattr(templates, "SECONDS", 0.1)
    record = Record({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "x.jsonl, line 1")

    def encode():
        with pytest.raises(templates.Unusable, match="x.jsonl, line 1: the chat template took longer than 0.1 seconds"):
            encoding.encode_all([record], byte_pairs(), template, "last", window=64, bad_rows="skip")
        return True

    with ThreadPoolExecutor() as pool:
        assert encode() if thread == "main" else pool.submit(encode).result()
    assert clock.within(5, lambda: sum(range(1000))) == 499500, "nothing is left behind"


def test_a_call_that_ends_in_time_is_never_interrupted_later():
    for _ in range(200):
        with contextlib.suppress(TimeoutError):
            clock.within(clock.TICK / 100, lambda: time.sleep(clock.TICK / 100))
    time.sleep(2 * clock.TICK)
    assert not clock._running and not clock._watching
