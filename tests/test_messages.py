"""The manners in which turns, tools and judgements are written down, all brought to one form; and rows gone wrong at random.

Expected values are written out whole: a tool's answer that became the assistant's would be trained on without a word.
"""

import json
import random

import pytest
from toy_tokenizers import characters, conversation

from jaxpost.data import chat, encoding, formats, readers
from jaxpost.data.formats import Completion, Conversation, Preference, Rated
from jaxpost.data.readers import Record
from jaxpost.errors import UserError

USER, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d"}}]
FOUND = {"role": "tool", "content": "7"}


def read(row, **columns):
    return formats.recognise(Record(row, "p"), columns)


def test_contents_in_parts_and_their_weights():
    parts = [{"type": "text", "value": "b", "text": None}, "c", {"type": "text", "text": "d"}]
    thought = [{"type": "reasoning", "value": "hm"}, {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]
    row = {
        "messages": [
            {"role": "user", "content": parts, "loss_weight": 0.0},
            {"role": "assistant", "content": thought, "loss_weight": 1.0},
            {"role": "tool", "content": [{"type": "text", "value": "7"}], "name": "f", "tool_call_id": "1", "score": 3},
            {"role": "assistant", "content": "a", "weight": 0},
        ]
    }
    messages = [{"role": "user", "content": "bcd"}, CALL | {"reasoning_content": "hm"}]
    messages += [FOUND | {"name": "f", "tool_call_id": "1"}, SAID]
    assert read(row) == Conversation(messages, "p", None, None, (3,))


def test_openai_tool_turns():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}, "index": 0}]
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}, FOUND, FOUND, SAID], "tools": TOOLS}
    call = CALL | {"tool_calls": [{"id": "1"} | CALL["tool_calls"][0]]}
    assert read(row) == Conversation([USER, call, FOUND, FOUND, SAID], "p", None, TOOLS)
    kept = SAID | {"reasoning_content": "hm"}
    assert read({"messages": [USER, kept | {"audio": None}]}).messages == [USER, kept]


def test_sharegpt_with_tools_and_system():
    said = {"human": "q", "function_call": '{"name": "f", "arguments": {"x": 1}}', "observation": "7", "gpt": "a"}
    row = {"conversations": [{"from": who, "value": what} for who, what in said.items()], "system": "s"}
    system = [{"role": "system", "content": "s"}]
    for tools in ('[{"name": "f", "description": "d"}]', json.dumps(TOOLS)):
        assert read(row | {"tools": tools}) == Conversation([*system, USER, CALL, FOUND, SAID], "p", None, TOOLS)
    assert read(row | {"tools": "[]", "system": ""}) == Conversation([USER, CALL, FOUND, SAID], "p")
    own = row | {"conversations": [{"from": "system", "value": "own"}, *row["conversations"]]}
    assert read(own).messages[:2] == [{"role": "system", "content": "own"}, USER], (
        "a system turn of the conversation's own stays"
    )


def test_gsm8k_and_a_structure_of_sequences():
    assert read({"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"}).messages[1]["content"] == "1+1=<<1+1=2>>2\n#### 2"
    assert read({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}) == Conversation([USER, SAID], "p")


def test_preferences_in_every_form():
    other = SAID | {"content": "b"}
    expected = Preference([USER], [SAID], [other], "p")
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [SAID], "rejected": [other]},
        {"prompt": "q", "chosen": [USER, SAID], "rejected": [USER, other]},
        {"chosen": [USER, SAID], "rejected": [USER, other]},
        {"messages": [USER], "chosen": SAID, "rejected": other, "label": True},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ]
    for row in rows:
        assert read(row) == expected, row
    system = {"role": "system", "content": "s"}
    assert read({"prompt": "q", "chosen": [system, USER, SAID], "rejected": [system, USER, other]}).prompt_messages == [
        system,
        USER,
    ]
    assert read({"prompt": "q", "chosen": "a", "rejected": ""}).rejected_messages == [SAID | {"content": ""}]


def test_a_transcript_parts_where_the_answers_do():
    same = "\n\nHuman: q\n\nAssistant: a\n\nAssistant: more\n\nHuman: r"
    pair = read({"chosen": same + "\n\nAssistant: x\n\nHuman: s\n\nAssistant: y", "rejected": same + "\n\nAssistant: z"})
    assert pair.prompt_messages == conversation("q", "a\n\nmore", "r"), "successive turns of one speaker are one"
    assert pair.chosen_messages == [*conversation("q", "x")[1:], *conversation("s", "y")]
    assert pair.rejected_messages == [SAID | {"content": "z"}]
    equal = read({"chosen": same + "\n\nAssistant: x", "rejected": same + "\n\nAssistant: x"})
    assert equal.chosen_messages == equal.rejected_messages == [SAID | {"content": "x"}]
    longer = read({"chosen": same + "\n\nAssistant: x\n\nHuman: s\n\nAssistant: y", "rejected": same + "\n\nAssistant: x"})
    assert len(longer.chosen_messages) == 3 and len(longer.rejected_messages) == 1, "an answer is never empty of turns"


def test_rated_answers():
    expected = Rated([USER], [SAID], False, "p")
    rows = [
        {"messages": [USER, SAID], "label": False},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False},
        {"prompt": "q", "completion": "a", "label": False},
        {"prompt": [USER], "completion": [SAID], "label": False},
    ]
    for row in rows:
        assert read(row) == expected, row
    assert isinstance(read({"messages": [USER, SAID], "label": "easy"}), Conversation), (
        "a label that is no verdict is only a column"
    )
    assert isinstance(read({"prompt": "q", "completion": "a", "label": 1}), Completion)


def test_columns_name_what_a_shape_takes():
    row = {"problem": "q", "solution": "a", "text": "t", "prompt": "x", "label": True}
    assert read(row, prompt="problem", completion="solution") == Completion("q", "a", "p"), (
        "whole by themselves, so nothing else"
    )
    assert read(row, completion="solution") == Rated([USER | {"content": "x"}], [SAID], True, "p"), (
        "the others stay beside them"
    )
    assert read({"prompt": "q", "canonical_solution": "a"}, completion="canonical_solution") == Completion("q", "a", "p")
    rated = {"messages": [USER, SAID], "label": True}
    assert read(rated, messages="messages") == Conversation([USER, SAID], "p")
    pair = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    assert read(pair, messages="chosen") == Conversation([USER, SAID], "p")
    sharegpt = {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {}}
    assert read(sharegpt, prompt="conversations", completion="chosen") == Conversation([USER, SAID], "p", 1)
    with pytest.raises(UserError, match="config.columns: no shape has a column 'prompts'. Did you mean 'prompt'?"):
        read(row, prompts="problem")
    with pytest.raises(UserError, match="p: no column 'query', which config.columns names; the row has problem, solution"):
        read(row, prompt="query", completion="solution")


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, 'config.columns="prompt=prompt,completion=chosen"'),
        ({"chosen": [USER, SAID], "rejected": [USER, SAID]}, 'config.columns="messages=chosen"'),
        ({"messages": [USER, SAID], "label": True}, 'config.columns="messages=messages"'),
        ({"prompt": "q", "completion": "a", "label": True}, 'config.columns="prompt=prompt,completion=completion"'),
    ],
)
def test_imitation_refuses_judgements_and_says_what_makes_demonstrations_of_them(row, hint):
    with pytest.raises(UserError, match="p: .* only a preference objective learns from") as error:
        encoding.encode_all([Record(row, "p")], characters(), window=9)
    assert hint in str(error.value)
    columns = dict(pair.split("=") for pair in hint.split('"')[1].split(","))
    assert encoding.encode_all([Record(row, "p")], characters(), window=9, columns=columns).report["count"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "p, message 1: a part of type 'image_url'; content",
        ),
        ({"messages": [{"role": "user", "content": [3]}]}, "p, message 1: a part of type 'int'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "p, message 1: text must be a string, and is missing",
        ),
        ({"messages": [USER, FOUND]}, "p, message 2: a tool's turn without a call before it"),
        (
            {"messages": [USER, CALL, SAID]},
            "p, message 3: the role is assistant, not tool; the tools that were called answer first",
        ),
        ({"messages": [USER, CALL, FOUND, USER]}, "p, message 4: the role is user, not tool or assistant"),
        (
            {"messages": [USER | {"tool_calls": CALL["tool_calls"]}]},
            "p, message 1: reasoning and tool calls belong to the assistant",
        ),
        ({"messages": [USER, SAID | {"tool_calls": [{"name": 3}]}]}, "p, message 2: a tool call must be an object with a name"),
        ({"messages": [USER, SAID | {"tool_calls": "f"}]}, "p, message 2: tool_calls must be a list"),
        (
            {"messages": [USER, SAID | {"tool_calls": [{"name": "f", "arguments": "{x"}]}]},
            "p, message 2: a call's arguments is brok",
        ),
        ({"messages": [USER, SAID | {"tool_calls": [{"name": "f", "arguments": [1]}]}]}, "arguments must be an object"),
        ({"messages": [USER, SAID | {"weight": 0.5}]}, "p, message 2: weight 0.5; a turn is learned (1) or not (0)"),
        ({"messages": [USER, SAID], "tools": [{"f": 1}]}, "p: tools must be a list of functions, each an object with a name"),
        ({"messages": [USER, SAID], "tools": "{"}, "p: tools is broken JSON"),
        ({"messages": [USER, SAID], "tools": 3}, "p: tools must be a list"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            "p, message 1: from 'bot' is not supported; the speakers are human",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "p, message 1: from ['gpt'] is not supported"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "p, message 1: a function_call is broken JSON"),
        ({"chosen": "a", "rejected": "b"}, "p: chosen is an answer without a prompt; give a column prompt"),
        (
            {"chosen": [USER, SAID], "rejected": [USER | {"content": "r"}, SAID]},
            "p: chosen and rejected answer different prompts",
        ),
        ({"prompt": "r", "chosen": [USER, SAID], "rejected": [USER, SAID]}, "p: chosen begins with another prompt than prompt"),
        ({"prompt": "r", "chosen": [], "rejected": [SAID]}, "p: chosen has no turns"),
        ({"messages": [USER, SAID, USER], "label": True}, "p: the answer that is judged must be an assistant's turn"),
    ],
)
def test_a_row_that_breaks_the_rules_is_refused_with_its_place(row, message):
    with pytest.raises(UserError) as error:
        read(row)
    assert message in str(error.value)


# ---- rows gone wrong at random

SOUND = [
    {"messages": [USER, SAID]},
    {"messages": [USER, CALL, FOUND, SAID], "tools": TOOLS},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, SAID | {"weight": 0}, USER, SAID]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]", "system": "s"},
    {"prompt": [USER], "completion": [SAID]},
    {"prompt": "q", "completion": "a"},
    {"instruction": "q", "input": "i", "output": "a", "system": "s"},
    {"question": "q", "answer": "a"},
    {"text": "t"},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": [USER, SAID], "rejected": [USER, SAID]},
    {"messages": [USER, SAID], "label": True},
]
JUNK = [
    None,
    0,
    -1.5,
    True,
    "",
    " \n",
    "x",
    "\ud800",
    "\x00",
    "{",
    "\n\nHuman:",
    [],
    {},
    [[]],
    [None],
    {"role": "user"},
    "9" * 5000,
]
JUNK += [float("nan"), {"a": {"b": [1]}}, [{"type": "image"}], "\U0001f600", [USER], SAID]


def spoiled(rng, value):
    """The value with one thing in it changed, dropped or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        way = rng.random()
        if way < 0.15:
            return rest
        return rest | (
            {rng.choice(["x", "role", "text", "tools", "label"]): value[key]} if way < 0.3 else {key: spoiled(rng, value[key])}
        )
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        if rng.random() < 0.3:
            return value[:place] + value[place + 1 :] if rng.random() < 0.5 else value[: place + 1] + value[place:]
        return [*value[:place], spoiled(rng, value[place]), *value[place + 1 :]]
    return rng.choice(JUNK)


def spoiled_lines(count, seed):
    """Lines of JSON, each a sound row gone wrong at random; one in eight is no JSON object any more."""
    rng = random.Random(seed)
    for _ in range(count):
        row = rng.choice(SOUND)
        for _ in range(rng.randint(1, 3)):
            row = spoiled(rng, row)
        line = json.dumps(row)
        yield line[: rng.randrange(1, len(line) + 1)] if rng.random() < 0.125 else line


def test_200_rows_gone_wrong_at_random_are_refused_with_place_and_remedy_or_learned(tmp_path):
    lines, tokenizer = list(spoiled_lines(200, seed=0)), characters()
    outcomes = []
    for number, line in enumerate(lines):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(line)
        try:
            (record,) = readers.read(str(file))
            example = chat.encode(formats.demonstration(record), tokenizer)
            assert len(example["tokens"]) == len(example["mask"])
            outcomes.append("learned")
        except UserError as error:
            message = str(error)
            assert f"{number}.jsonl" in message and "; " in message, message
            outcomes.append(message)
    refused = [outcome for outcome in outcomes if outcome != "learned"]
    assert len(outcomes) == 200 and len(refused) > 120 and outcomes.count("learned") > 10

    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(lines))
    unread = []
    records = readers.read(str(file), unread)
    encoded = encoding.encode_all(records, tokenizer, window=9000, bad_rows="skip")
    blank = sum(not line.strip() for line in lines)
    assert encoded.report["count"] + encoded.report["skipped"] + len(unread) + blank == 200, "not one is lost without a word"
    masks = sum(bool(chat_mask(line, tokenizer)) for line in lines)
    assert encoded.report["count"] == masks


def chat_mask(line, tokenizer):
    """Whether a line alone is learned from: some token of it is in the mask."""
    try:
        return chat.encode(formats.demonstration(Record(json.loads(line), "p")), tokenizer)["mask"].any()
    except (UserError, ValueError, AttributeError):
        return False


def test_what_a_system_or_earlier_turns_say_is_never_dropped():
    turns = conversation("q", "a")
    system = [{"role": "system", "content": "s"}]
    for row in (
        {"messages": turns, "system": "s"},
        {"prompt": turns[:1], "completion": turns[1:], "system": "s"},
        {"instruction": "q", "output": "a", "system": "s", "history": []},
    ):
        assert formats.recognise(Record(row, "p")).messages == system + turns
    earlier = {"instruction": "q", "output": "a", "history": [["x", "y"]]}
    assert formats.recognise(Record(earlier, "p")).messages == conversation("x", "y", "q", "a")
    assert read({"q": "q", "output": "a", "past": [["x", "y"]]}, instruction="q", output="output", history="past").messages == (
        conversation("x", "y", "q", "a")
    )
    rated, pair = Rated([*system, USER], [SAID], True, "p"), Preference([*system, USER], [SAID], [SAID], "p")
    for row in ({"messages": turns}, {"prompt": "q", "completion": "a"}, {"prompt": turns[:1], "completion": turns[1:]}):
        assert read(row | {"label": True, "system": "s"}) == rated
    for row in ({"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q", "chosen": turns, "rejected": turns}):
        assert read(row | {"system": "s"}) == pair
    assert read({"chosen": turns, "rejected": turns, "system": "s"}) == pair
    assert read({"chosen": system + turns, "rejected": system + turns, "system": "other"}) == pair, "its own stays"
    with pytest.raises(UserError, match="p: system goes with messages"):
        formats.recognise(Record({"prompt": "q", "completion": "a", "system": "s"}, "p"))
    with pytest.raises(UserError, match="p: history must be a list of"):
        formats.recognise(Record(earlier | {"history": ["x"]}, "p"))


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
@pytest.mark.parametrize("value", [{"x": 1}, '{"x": 1}'])
def test_arguments_of_a_call_are_learned_under_whatever_key(key, value):
    call = {"name": "f", key: value}
    for calls in ([call], [{"type": "function", "function": call}], [{"function": {"name": "f"}, key: value}]):
        assert read({"messages": [USER, {"role": "assistant", "tool_calls": calls}, FOUND, SAID]}).messages[1] == CALL
    asked, answered = {"from": "human", "value": "q"}, {"from": "observation", "value": "7"}
    turn = {"from": "function_call", "value": json.dumps({"name": "f", key: value})}
    assert read({"conversations": [asked, turn, answered, {"from": "gpt", "value": "a"}]}).messages[1] == CALL
    # OpenAI's first manner of calling.
    legacy = {"role": "assistant", "content": "", "function_call": call}
    assert read({"messages": [USER, legacy, {"role": "function", "name": "f", "content": "7"}, SAID]}).messages[1] == CALL


def test_a_call_without_arguments_is_empty_only_where_nothing_is_given():
    for call in ({"name": "f"}, {"name": "f", "arguments": ""}, {"name": "f", "arguments": None, "id": 7, "type": "function"}):
        (read_call,) = read({"messages": [USER, SAID | {"tool_calls": [call]}]}).messages[1]["tool_calls"]
        assert read_call["function"] == {"name": "f", "arguments": {}}
    for call, message in (
        (
            {"name": "f", "kwargs": {"x": 1}},
            "a tool call has the key 'kwargs', which is not read; its keys are name, arguments",
        ),
        ({"name": "f", "arguments": {"x": 1}, "input": {"x": 2}}, "a call's arguments are given in two places and differ"),
    ):
        with pytest.raises(UserError, match=f"p, message 2: {message}"):
            read({"messages": [USER, SAID | {"tool_calls": [call]}]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_a_thought_is_read_under_whatever_key(key):
    assert read({"messages": [USER, SAID | {key: "hm"}]}).messages[1] == SAID | {"reasoning_content": "hm"}
    turn = {"from": "gpt", "value": "a", key: "hm"}
    assert read({"conversations": [{"from": "human", "value": "q"}, turn]}).messages[1] == SAID | {"reasoning_content": "hm"}


def test_keys_that_carry_text_are_learned_or_refused():
    calls = CALL["tool_calls"]
    turn = {"from": "gpt", "value": "a", "tool_calls": calls}
    assert read({"conversations": [{"from": "human", "value": "q"}, turn]}).messages[1] == SAID | {"tool_calls": calls}
    for said in (SAID | {"refusal": "no"}, SAID | {"steps": [{"why": "x"}]}, SAID | {"train_detail": [{"train": False}]}):
        key = list(said)[-1]
        with pytest.raises(
            UserError, match=f"p, message 2: the key '{key}' of a turn is not read, so what it holds would be lost"
        ):
            read({"messages": [USER, said]})
    for row in (SAID | {"thinking": "a", "reasoning": "b"}, SAID | {"tool_calls": calls, "function_call": {"name": "g"}}):
        with pytest.raises(UserError, match="p, message 2: .* are given in two places and differ; write them once"):
            read({"messages": [USER, row]})
    with pytest.raises(UserError, match="p, message 2: value and content are both given"):
        read({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "content": "b"}]})
    plain = SAID | {"language": "English", "id": "7", "score": 3, "refusal": "", "extra": {"n": [1]}}
    assert read({"messages": [USER, plain]}).messages[1] == SAID, "what only describes a turn, and what has no text"


@pytest.mark.parametrize("mark", ["weight", "loss_weight", "loss", "train", "training", "trainable"])
@pytest.mark.parametrize("no", [0, False])
def test_a_turn_marked_not_to_be_learned_is_not_in_any_shape(mark, no):
    marked, asked = SAID | {mark: no}, {"from": "human", "value": "q"}
    assert read({"messages": [USER, marked, USER, SAID | {mark: 1}]}).untrained == (1,)
    assert read({"prompt": [USER], "completion": [marked, USER, SAID]}).untrained == (1,)
    call = {"from": "function_call", "value": '{"name": "f"}', mark: no}
    answers = [
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "a", mark: no},
        asked,
        {"from": "gpt", "value": "b"},
    ]
    assert read({"conversations": [asked, call, *answers]}).untrained == (1, 3)
    with pytest.raises(UserError, match=f"p, message 2: {mark} 0.5; a turn is learned"):
        read({"messages": [USER, SAID | {mark: 0.5}]})
    answer = [marked, USER, SAID]
    for row in (
        {"prompt": [USER], "completion": answer, "label": True},
        {"prompt": [USER], "chosen": answer, "rejected": [SAID]},
    ):
        judged = read(row)
        kept = judged.completion if isinstance(judged, Rated) else judged.chosen_messages
        assert [message.get("weight") for message in kept] == [0, None, None]


@pytest.mark.parametrize(
    ("row", "setting"),
    [
        ({"id": 3, "problem": "q", "solution": "a"}, "prompt=problem,completion=solution"),
        ({"answer_text": "a", "title": "t", "query": "q"}, "prompt=query,completion=answer_text"),
        ({"first": "q", "second": "a"}, "prompt=first,completion=second"),
        ({"dialogue": [USER, SAID]}, "messages=dialogue"),
        ({"document": "t"}, "text=document"),
    ],
)
def test_unknown_columns_are_refused_with_a_setting_that_reads_them(row, setting):
    with pytest.raises(UserError, match=f"p: columns not recognised: .*--config.columns={setting}$"):
        read(row)
    columns = dict(pair.split("=") for pair in setting.split(","))
    assert formats.recognise(Record(row, "p"), columns)
