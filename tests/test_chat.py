"""From a file to tokens and a mask: rows are read with their place, recognised or refused with a remedy, and masked.

What is asserted is exact. The traps are those that made other frameworks train on the wrong tokens without a word: a mask one
off, a stop token that is also the padding, a doubled first token, a seam inside a token, a template without marks.
"""

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from toy_tokenizers import byte_pairs, characters, conversation, learned

from jaxpost.data import chat, formats, pack, templates
from jaxpost.data.formats import Completion, Conversation, Text
from jaxpost.data.readers import Record
from jaxpost.errors import UserError

HEADERS = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
# Strips what the assistant thought from all turns but the last, as the templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{{ m.content if loop.last else m.content.split('#')[-1] }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
TALK = Conversation(
    [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
    ],
    "talk",
)


# ---- formats


def test_shapes_are_recognised_by_their_columns():
    turns = conversation("q", "a")
    system = [{"role": "system", "content": "s"}]
    cases = [
        ({"messages": turns, "id": 7}, Conversation(turns, "p")),
        ({"messages": [turn | {"weight": 1} for turn in turns]}, Conversation(turns, "p")),
        ({"prompt": "q", "completion": "a"}, Completion("q", "a", "p")),
        ({"prompt": "", "completion": "a"}, Completion("", "a", "p")),
        ({"prompt": system + turns[:1], "completion": turns[1:]}, Conversation(system + turns, "p", 2)),
        ({"instruction": "q", "output": "a"}, Conversation(turns, "p")),
        ({"instruction": "q", "input": "", "output": "a"}, Conversation(turns, "p")),
        ({"instruction": "q", "input": "i", "system": None, "output": "a"}, Conversation(conversation("q\ni", "a"), "p")),
        (
            {"instruction": "q", "input": "i", "system": "s", "output": "a"},
            Conversation(system + conversation("q\ni", "a"), "p"),
        ),
        ({"text": "t", "messages": None}, Text("t", "p")),
    ]
    for row, example in cases:
        assert formats.recognise(Record(row, "p")) == example


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "output": None}, "p: columns not recognised: question, output (null); rename them to one of: mess"),
        ({}, "p: columns not recognised: none;"),
        ({"messages": "hi"}, "p: messages must be a list of objects"),
        (
            {"messages": [{"role": "critic", "content": "x"}]},
            "p, message 1: role 'critic' is not supported; the roles are system, user, assistant, tool; write it as one",
        ),
        ({"messages": [{"role": "developer", "content": "x"}]}, "user, assistant, tool; write it as system"),
        ({"messages": [{"content": "x"}]}, "p, message 1: role None is not supported"),
        ({"messages": conversation("q", "a", "q")[1:]}, "p, message 1: the role is assistant, not user; user and"),
        ({"messages": conversation("q") * 2}, "p, message 2: the role is user, not assistant"),
        ({"messages": conversation("q") + [{"role": "system", "content": "x"}]}, "p, message 2: a system turn must be first"),
        ({"messages": conversation("q", " \n")}, "p, message 2: content of the assistant's turn is empty"),
        ({"messages": conversation("q", 3)}, "p, message 2: content must be a string, and is of type int"),
        ({"messages": conversation(None, "a")}, "p, message 1: content must be a string, and is missing or null"),
        ({"messages": conversation("q")}, "p: a conversation without an assistant turn leaves nothing to learn; add one or"),
        ({"messages": []}, "p: a conversation without a user turn; add one"),
        ({"prompt": "q", "completion": ""}, "p: completion is empty, so there is nothing to learn; fill it in"),
        ({"prompt": "q", "completion": []}, "p: prompt and completion must both be strings or both lists of messages"),
        ({"prompt": conversation("q", "a"), "completion": conversation("q")}, "p: the completion has no assistant turn"),
        ({"prompt": 1, "completion": "a"}, "p: prompt must be a string, and is of type int"),
        ({"instruction": "q", "output": " "}, "p: output is empty"),
        ({"instruction": "q", "input": 5, "output": "a"}, "p: input must be a string, and is of type int"),
        ({"text": ""}, "p: text is empty"),
    ],
)
def test_a_row_that_breaks_the_rules_is_refused_with_its_place(row, message):
    with pytest.raises(UserError) as error:
        formats.recognise(Record(row, "p"))
    assert message in str(error.value)


# ---- chat


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", "<s>be\nab\n⟦cd</s>⟧e\n⟦f</s>⟧"),
        ("last", "<s>be\nab\ncd</s>e\n⟦f</s>⟧"),
        ("completion", "<s>be\nab\ncd</s>e\n⟦f</s>⟧"),
        ("all", "<s>⟦be\nab\ncd</s>e\nf</s>⟧"),
    ],
)
def test_plain_template_trains_from_the_first_token_of_a_turn_to_its_stop_token(train_on, expected):
    tokenizer = characters()
    example = chat.encode(TALK, tokenizer, train_on=train_on)
    assert learned(example, tokenizer) == expected
    assert example["tokens"].dtype == np.int32 and example["mask"].dtype == np.bool_
    assert (example["tokens"] == 0).sum() == 1, "the first token is written by the template alone, never twice"


def test_a_completion_of_several_turns_is_learned_whole_and_its_prompt_is_not():
    tokenizer, row = characters(), {"prompt": TALK.messages[:2], "completion": TALK.messages[2:]}
    example = formats.recognise(Record(row, "p"))
    assert learned(chat.encode(example, tokenizer, train_on="completion"), tokenizer) == "<s>be\nab\n⟦cd</s>⟧e\n⟦f</s>⟧"
    later = formats.recognise(Record({"prompt": TALK.messages[:4], "completion": TALK.messages[4:]}, "p"))
    assert learned(chat.encode(later, tokenizer, train_on="completion"), tokenizer) == "<s>be\nab\ncd</s>e\n⟦f</s>⟧"


def test_mask_is_exact_token_by_token():
    example = chat.encode(Conversation(conversation("a", "bc"), "p"), characters(adds_bos=False, bos_token=None))
    ids = {character: ord(character) - 32 + 3 for character in "abc"}
    assert example["tokens"].tolist() == [ids["a"], 98, ids["b"], ids["c"], 1]
    assert example["mask"].tolist() == [False, False, True, True, True]


def test_chatml_gives_the_end_of_turn_to_the_turn_and_the_white_space_after_it_to_nobody():
    tokenizer = byte_pairs(templates.TEMPLATES["chatml"])
    expected = (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n⟦cd<|im_end|>⟧\n"
        "<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n⟦f<|im_end|>⟧\n"
    )
    assert learned(chat.encode(TALK, tokenizer), tokenizer) == expected
    assert learned(chat.encode(TALK, byte_pairs(), "chatml"), tokenizer) == expected


def test_stop_token_is_learned_where_it_is_also_the_padding_token():
    tokenizer = byte_pairs()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = chat.encode(Conversation(conversation("a", "b"), "p"), tokenizer, "plain")
    assert learned(example, tokenizer) == "a\n⟦b<|endoftext|>⟧"
    assert pack.pack([example], 6)["mask"].tolist() == [False, False, True, True, False, False]


def test_template_that_ignores_the_generation_prompt_trains_what_generation_must_produce():
    tokenizer = byte_pairs(HEADERS)
    talk = Conversation(conversation("a", "b"), "p")
    expected = "<|im_start|>user\na<|im_end|>\n⟦<|im_start|>assistant\nb<|im_end|>⟧\n"
    assert learned(chat.encode(talk, tokenizer), tokenizer) == expected
    prompt = chat.encode_prompt(talk.messages[:1], tokenizer)
    assert tokenizer.decode(prompt.tolist()) == "<|im_start|>user\na<|im_end|>\n" and prompt.dtype == np.int32


def test_prompt_for_generation_is_the_beginning_of_the_example():
    for tokenizer, template in ((characters(), None), (byte_pairs(), "chatml")):
        example = chat.encode(Conversation(TALK.messages[:3], "p"), tokenizer, template)
        prompt = chat.encode_prompt(TALK.messages[:2], tokenizer, template)
        assert example["tokens"][: len(prompt)].tolist() == prompt.tolist()
        assert example["mask"].tolist().index(True) == len(prompt)


def test_template_that_rewrites_earlier_turns_is_refused_and_its_last_turn_can_be_trained():
    tokenizer = byte_pairs(FORGETFUL)
    talk = Conversation(conversation("a", "x#b", "c", "y#d"), "rows, row 3")
    with pytest.raises(UserError, match=r'rows, row 3, message 2: .*rewrites earlier turns.*say train_on="last"'):
        chat.encode(talk, tokenizer)
    shown = learned(chat.encode(talk, tokenizer, train_on="last"), tokenizer)
    assert shown.endswith("assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦y#d<|im_end|>⟧\n")
    unfinished = Conversation(talk.messages + conversation("e"), "p")
    with pytest.raises(UserError, match="p, message 4: .*end the conversation with the assistant"):
        chat.encode(unfinished, tokenizer, train_on="last")


def test_template_that_opens_the_turn_otherwise_for_generation_is_refused():
    tokenizer = characters()
    template = templates.TEMPLATES["plain"] + "{% if add_generation_prompt %}<think>{% endif %}"
    with pytest.raises(UserError, match="p, message 2: for generation .* opens the assistant's turn with '<think>'.*begin its"):
        chat.encode(Conversation(conversation("a", "b"), "p"), tokenizer, template)
    talk = Conversation(conversation("a", "<think>b"), "p")
    assert learned(chat.encode(talk, tokenizer, template), tokenizer) == "<s>a\n<think>⟦b</s>⟧"


def test_template_without_a_stop_token_is_refused():
    talk = Conversation(conversation("a", "bcd"), "p")
    with pytest.raises(UserError, match=r"p: the chat template ends the assistant's turn in 'bcd'.*\{\{ eos_token \}\}$"):
        chat.encode(talk, characters(), "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    with pytest.raises(UserError, match="p, message 2: the chat template leaves out the content of the assistant's turn"):
        chat.encode(talk, characters(), "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="end the turn with {{ eos_token }} and give the tokenizer an eos_token"):
        chat.encode(talk, characters(eos_token=None))


def test_a_header_that_swallows_white_space_is_not_learned():
    tokenizer = characters()
    tokenizer.add_tokens([transformers.AddedToken("<bot>", rstrip=True, special=True)])
    template = (
        "{% for m in messages %}{{ '<bot>' if m.role == 'assistant' }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '<bot>' if add_generation_prompt }}"
    )
    example = chat.encode(Conversation(conversation("a", " b"), "p"), tokenizer, template)
    assert tokenizer.convert_ids_to_tokens(example["tokens"].tolist()) == ["a", "<bot>", "b", "</s>"]
    assert example["mask"].tolist() == [False, False, True, True]


def test_a_token_across_the_seam_is_learned_since_the_whole_is_tokenised_at_once():
    tokenizer = byte_pairs()
    example = chat.encode(Completion("ab", "cd", "p"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(example["tokens"].tolist()) == ["a", "bc", "d", "<|endoftext|>"]
    assert example["mask"].tolist() == [False, True, True, True]
    turn = chat.encode(
        Conversation(conversation("a", "c"), "p"),
        tokenizer,
        (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{{ ': ' }}"
            "{% else %}{{ eos_token }}{% endif %}{% endfor %}"
        ),
    )
    assert tokenizer.convert_ids_to_tokens(turn["tokens"].tolist()) == ["a", ":", "Ġc", "<|endoftext|>"]
    assert turn["mask"].tolist() == [False, False, True, True]


def test_characters_of_many_bytes_keep_their_place():
    tokenizer = byte_pairs()
    example = chat.encode(Completion("é", "日é", "p"), tokenizer)
    assert example["mask"].tolist() == [False] * 2 + [True] * 6
    assert learned(example, tokenizer) == "é⟦日é<|endoftext|>⟧"


@pytest.mark.parametrize(
    ("example", "adds_bos", "train_on", "expected"),
    [
        (Completion("ab", "cd", "p"), True, "assistant", "<s>ab⟦cd</s>⟧"),
        (Completion("ab", "cd", "p"), True, "completion", "<s>ab⟦cd</s>⟧"),
        (Completion("ab", "cd", "p"), True, "all", "<s>⟦abcd</s>⟧"),
        (Completion("ab", "cd", "p"), False, "assistant", "ab⟦cd</s>⟧"),
        (Completion("", "cd", "p"), False, "assistant", "c⟦d</s>⟧"),
        (Completion("<s>ab", "cd</s>", "p"), True, "assistant", "<s>ab⟦cd</s>⟧"),
        (Text("ab", "p"), True, "assistant", "<s>⟦ab</s>⟧"),
        (Text("ab", "p"), False, "last", "a⟦b</s>⟧"),
        (Text("<s>ab</s>", "p"), True, "assistant", "<s>⟦ab</s>⟧"),
    ],
)
def test_documents_begin_and_end_with_one_special_token_each(example, adds_bos, train_on, expected):
    tokenizer = characters(adds_bos)
    assert learned(chat.encode(example, tokenizer, train_on=train_on), tokenizer) == expected


def test_errors_of_encoding_name_the_remedy():
    tokenizer = characters()
    cases = [
        (lambda: chat.encode(TALK, tokenizer, "chatlm"), "chat template 'chatlm' is not known; give one of plain, chatml"),
        (lambda: chat.encode(TALK, tokenizer, train_on="user"), "train_on='user' is not known; choose one of assistant, last"),
        (
            lambda: chat.encode(TALK, tokenizer, "{{ raise_exception('no system') }}"),
            "talk: the chat template refuses the mess",
        ),
        (lambda: chat.encode(TALK, tokenizer, "{{ a( }}"), "the chat template is no Jinja, by its line 1: unexpected"),
        (lambda: chat.encode(Text("a", "p"), characters(eos_token=None)), "p: the tokenizer has no eos_token"),
    ]
    for call, message in cases:
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value)


def test_stop_ids_are_eos_and_the_token_that_ends_a_turn():
    tokenizer = byte_pairs(templates.TEMPLATES["chatml"])
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert chat.stop_ids(tokenizer) == (eos, end)
    assert chat.stop_ids(tokenizer, "plain") == (eos,)
    assert chat.stop_ids(characters()) == (1,)
    assert chat.stop_ids(characters(eos_token=None)) == ()


def test_show_in_colour():
    example = chat.encode(Text("ab", "p"), characters())
    assert chat.show(example["tokens"], example["mask"], characters()) == "<s>\033[32mab</s>\033[0m"


def prepending():
    """Characters after SentencePiece's manner: a ▁ put before the text and for every space, which offsets must survive."""
    tokens = ["<s>", "</s>", "<unk>", "▁", *"abcd\n"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*tokens, "▁a", "▁c"])}, [("▁", "a"), ("▁", "c")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def test_a_normaliser_that_prepends_does_not_shift_the_mask():
    tokenizer = prepending()
    spaced = chat.encode(Completion("a b", " cd", "p"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(spaced["tokens"].tolist()) == ["▁a", "▁", "b", "▁c", "d", "</s>"]
    assert spaced["mask"].tolist() == [False] * 3 + [True] * 3
    assert learned(spaced, tokenizer) == "a b⟦ cd</s>⟧"
    talk = chat.encode(Conversation(conversation("a", "b", "a", "d"), "p"), tokenizer)
    names = ["<s>", "▁a", "\n", "b", "</s>", "▁a", "\n", "d", "</s>"]
    assert tokenizer.convert_ids_to_tokens(talk["tokens"].tolist()) == names
    assert [name for name, on in zip(names, talk["mask"], strict=True) if on] == ["b", "</s>", "d", "</s>"]


# ---- what a template leaves out

KNOWN = "{{ tools | tojson if tools }}"
EACH = "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
END = "<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
CALL = {
    "type": "function",
    "function": {"name": "look", "arguments": {"city": "Norway", "days": [1, True], "note": 'a "b"\nc'}},
}
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ ARGUMENTS }}{% endfor %}"


def called(content="", **more):
    turn = {"role": "assistant", "content": content, "tool_calls": [CALL], **more}
    return Conversation([*conversation("q"), turn, {"role": "tool", "content": "4"}, *conversation("-", "a")[1:]], "p")


@pytest.mark.parametrize(
    ("template", "turn", "part"),
    [
        ("{{ m.content.split('</think>')[-1] }}", {"content": "<think>\nhm\n</think>\n\n5"}, "the thought"),
        ("{{ m.content.split('</think>')[-1] }}", {"content": "5", "reasoning_content": "hm"}, "the thought"),
        ("{{ m.content | replace('</think>', '') }}", {"content": "<think>hm</think>5"}, "</think> after the thought"),
        ("{{ m.content[:3] }}", {"content": "12345"}, "the content"),
        ("{{ m.content.split('\n')[0] }}", {"content": "1\n2"}, "the content"),
    ],
)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_part_of_a_learned_turn_that_the_template_leaves_out_is_refused_by_name(template, turn, part, train_on):
    talk = Conversation([*conversation("q"), {"role": "assistant", **turn}], "p")
    with pytest.raises(
        UserError, match=f"p, message 2: the chat template leaves out {part} of the assistant's turn; use another"
    ):
        chat.encode(talk, byte_pairs(), EACH + template + END, train_on)
    kept = "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}{{ m.content | trim }}"
    assert chat.encode(talk, byte_pairs(), EACH + kept + END, train_on)["mask"].any()


@pytest.mark.parametrize(
    ("template", "content", "part"),
    [
        ("{% if m.tool_calls %}CALLS{% else %}{{ m.content }}{% endif %}", "Let me look.", "the content"),
        ("{% if m.tool_calls %}CALLS{% else %}{{ m.content }}{% endif %}", "No", "the content"),
        ("{{ m.content }}CALLS", "No", None),
        ("CALLS{{ m.content | trim }}", ' I say {"city": "Norway"}\n', None),
    ],
)
@pytest.mark.parametrize(
    "arguments", ["c.function.arguments | tojson", "c.function.arguments", "c.function.arguments | string"]
)
def test_words_beside_a_call_are_learned_or_refused(template, content, part, arguments):
    template = KNOWN + EACH + template.replace("CALLS", CALLS.replace("ARGUMENTS", arguments)) + END
    template = template.replace("m.content", "(m.content or '')")
    if part is None:
        shown = learned(chat.encode(called(content), byte_pairs(), template), byte_pairs())
        assert content.strip() in shown and "Norway" in shown
        return
    with pytest.raises(UserError, match=f"p, message 2: the chat template leaves out {part} of the assistant's turn"):
        chat.encode(called(content), byte_pairs(), template)


@pytest.mark.parametrize(
    "arguments",
    [
        "c.function.arguments.values() | first",
        "{'at': c.function.arguments.values() | first} | tojson",
        "c.function.arguments | tojson | truncate(30)",
    ],
)
def test_arguments_that_the_template_leaves_out_are_refused_by_name(arguments):
    template = KNOWN + EACH + "{{ m.content }}" + CALLS.replace("ARGUMENTS", arguments) + END
    with pytest.raises(UserError, match="leaves out the argument '(days|note)' of the call of 'look' of the assistant's turn"):
        chat.encode(called(), byte_pairs(), template)


def test_what_a_prompt_says_and_the_template_leaves_out_is_refused_with_its_place():
    silent = EACH.replace("in messages", "in messages if m.role != 'system'") + "{{ m.content }}" + END
    tokenizer = byte_pairs()
    with pytest.raises(
        UserError, match="talk, message 1: the chat template leaves out what the system says; .*first user turn"
    ):
        chat.encode(Conversation([{"role": "system", "content": "be kind"}, *TALK.messages[1:]], "talk"), tokenizer, silent)
    with pytest.raises(UserError, match="the prompt, message 1: the chat template leaves out what the system says"):
        chat.encode_prompt([{"role": "system", "content": "be kind"}, *conversation("q")], tokenizer, silent)
    cut = EACH + "{{ m.content[:4] }}" + END
    with pytest.raises(UserError, match="p, message 3: the chat template leaves out what the user says"):
        chat.encode(Conversation(conversation("a", "b", "cdefg", "h"), "p"), tokenizer, cut)
    quoted = EACH + "{{ m.content | trim | tojson if m.role == 'user' else m.content }}" + END
    assert chat.encode(Conversation(conversation('a "b"\n c', "b"), "p"), tokenizer, quoted)["mask"].any()
    # SmolLM 3 and Qwen 3 take the switch out and obey it.
    switched = EACH + "{{ m.content | replace('/no_think', '') }}" + END
    assert chat.encode(Conversation(conversation("a /no_think", "b"), "p"), tokenizer, switched)["mask"].any()


def test_a_template_with_tools_that_leaves_one_out_is_refused():
    tools = [{"type": "function", "function": {"name": name}} for name in ("look", "listen")]
    template = "{{ (tools or [{'function': {'name': ''}}])[0].function.name }}" + EACH + "{{ m.content }}" + CALLS + END
    talk = called()._replace(tools=tools)
    with pytest.raises(UserError, match="p: the chat template leaves out the tool 'listen'"):
        chat.encode(talk, byte_pairs(), template.replace("ARGUMENTS", "c.function.arguments | tojson"))


PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
OLMO = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}{% if m.role == 'assistant' and loop.last %}"
    "{{ eos_token }}{% else %}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (PHI, ["⟦a<|end|>⟧\n<|user|>", "⟦b<|end|>⟧\n<|user|>", "⟦d<|end|>\n<|endoftext|>⟧"]),
        (OLMO, ["⟦a<|im_end|>⟧\n<|im_start|>user", "⟦b<|im_end|>⟧\n<|im_start|>user", "⟦d<|endoftext|>⟧"]),
    ],
)
def test_a_template_that_ends_the_last_turn_otherwise_ends_every_turn(template, parts):
    tokenizer = byte_pairs()
    tokenizer.add_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    shown = learned(chat.encode(Conversation(conversation("q", "a", "r", "b", "s", "d"), "p"), tokenizer, template), tokenizer)
    assert all(part in shown for part in parts) and shown.count("⟦") == 3, shown


def test_earlier_turns_without_an_end_are_refused_with_the_reason():
    tokenizer = byte_pairs()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    open_ended = PHI.replace("<|end|>\n", "")
    with pytest.raises(UserError, match="p, message 2: .*where this turn is the last it writes .*endoftext.*goes on .*user"):
        chat.encode(Conversation(conversation("q", "a", "r", "b"), "p"), tokenizer, open_ended)
    one = chat.encode(Conversation(conversation("q", "a"), "p"), tokenizer, open_ended)
    assert learned(one, tokenizer) == "<|user|>q<|assistant|>⟦a<|endoftext|>⟧"


def test_advice_on_train_on_is_given_only_where_it_helps():
    tokenizer = byte_pairs(FORGETFUL)
    with pytest.raises(UserError, match="p, message 2: .*end the conversation with the assistant") as error:
        chat.encode(Conversation(conversation("a", "x#b", "c"), "p"), tokenizer)
    assert "train_on" not in str(error.value), "it is the last answer already"
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    opened = template + "{% if add_generation_prompt %}<think>{% endif %}"
    with pytest.raises(UserError, match="for generation .*; use another template$"):
        chat.encode(Conversation(conversation("a", "b"), "p"), byte_pairs(), opened)


@pytest.mark.parametrize("content", ["a", "a<|im_end|>", "<think>a<|im_end|>", "b\n<|endoftext|>\n"])
def test_an_end_that_is_the_content_is_no_end_of_the_template(content):
    bare = "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}{{ '<|im_start|>' if add_generation_prompt }}"
    talk = Conversation(conversation("q", content), "p")
    with pytest.raises(
        UserError, match="p: the chat template ends the assistant's turn in .* so a model would never learn to stop"
    ):
        chat.encode(talk, byte_pairs(), bare)
    ended = bare.replace("m.content }}", "m.content }}<|im_end|>")
    assert chat.encode(talk, byte_pairs(), ended)["mask"][-1], "the template's own end, whatever the content ends in"


@pytest.mark.parametrize(("single", "begins"), [("<s> $A", True), ("$A <s>", False), ("<s> $A <s>", True), ("$A", False)])
def test_an_added_end_is_not_taken_for_the_beginning(single, begins):
    tokenizer = characters(adds_bos=False, eos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0)])
    example = chat.encode(Completion("ab", "cd", "p"), tokenizer)
    assert learned(example, tokenizer) == ("<s>" if begins else "") + "ab⟦cd<s>⟧"


def test_thoughts_that_only_the_last_turn_keeps_are_refused_of_earlier_ones():
    template = (
        EACH + "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content and loop.last }}{{ m.content }}" + END
    )
    turns = [m | ({"reasoning_content": "hm"} if m["role"] == "assistant" else {}) for m in conversation("q", "yes", "r", "no")]
    tokenizer = byte_pairs()
    for train_on, reason in (
        ("assistant", "rewrites earlier turns"),
        ("all", "leaves out the thought of the assistant's turn"),
    ):
        with pytest.raises(UserError, match=f'p, message 2: the chat template {reason}.*; say train_on="last"'):
            chat.encode(Conversation(turns, "p"), tokenizer, template, train_on)
    last = learned(chat.encode(Conversation(turns, "p"), tokenizer, template, "last"), tokenizer)
    assert last.endswith("⟦<think>hm</think>no<|im_end|>⟧\n") and last.count("hm") == 1
