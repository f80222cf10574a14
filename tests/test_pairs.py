"""Pairs and judged answers: from rows to documents that lie in a row together, by columns small enough to work out by hand.

The boundary between a prompt and its answers is the one thing that must survive tokenisation, so it is tried on a tokenizer
that merges across it. What is refused is refused with file and row.
"""

import json

import family_cases
import numpy as np
import pytest
from toy_tokenizers import byte_pairs, characters, conversation, learned

from jaxpost import recipe, sharding
from jaxpost.data import encoding, examples, formats, mixture, pack, readers, row_types, source
from jaxpost.data.examples import Example
from jaxpost.data.readers import Record
from jaxpost.declare import objective
from jaxpost.errors import UserError
from jaxpost.stages import datasets
from jaxpost.stages.plan import columns, plan_stage, scalars
from jaxpost.tokenizer import load

PLAIN = "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def records(*rows):
    return [Record(row, f"d.jsonl, line {i}") for i, row in enumerate(rows, start=1)]


def encode(rows, row_type="pairs", tokenizer=None, **options):
    options = {"window": 64, "template": PLAIN, **options}
    return encoding.encode_all(records(*rows), tokenizer or characters(), row_type=row_type, **options)


def texts(example, tokenizer):
    return [learned(document, tokenizer) for document in examples.documents(example)]


def listed(row):
    return {name: column.tolist() for name, column in row.items()}


# ---- layouts

PAIR = Example(np.array([5, 6, 7], np.int32), (np.array([8, 9]), np.array([4])), (np.ones(2, bool), np.ones(1, bool)), [1.0])


def lay_out(example, name, shared=False, reads=()):
    settings = examples.Settings(None, None, "assistant", 64, 64, "error", {}, shared, frozenset(reads))
    return row_types.load(name).lay_out(example._replace(values=np.float32(example.values)), settings)


def test_documents_of_a_pair_follow_each_other():
    assert listed(lay_out(PAIR, "pairs", reads=["margins"])) == {
        "tokens": [5, 6, 7, 8, 9, 5, 6, 7, 4],
        "mask": [False, False, False, True, True, False, False, False, True],
        "segments": [1, 1, 1, 1, 1, 2, 2, 2, 2],
        "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3],
        "margins": [1.0] * 9,
    }


def test_a_shared_prefix_is_there_once_but_for_its_last_token():
    row = lay_out(PAIR, "mismatched", True)
    assert listed(row) == {
        "tokens": [5, 6, 7, 8, 9, 7, 4],
        "mask": [False, False, False, True, True, False, True],
        "segments": [1, 1, 1, 1, 1, 2, 2],
        "positions": [0, 1, 2, 3, 4, 2, 3],
        "branches": [0, 0, 1, 1, 1, 2, 2],
        "labels": [1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0],
    }
    apart = lay_out(PAIR, "pairs")
    for one, other in zip(examples.documents(row), examples.documents(apart), strict=True):
        assert listed(one) == listed(other), "the same documents either way"
    short = PAIR._replace(prompt=np.zeros(0, np.int32))
    assert listed(lay_out(short, "pairs", True))["branches"] == [1, 1, 2]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [0, 1, 3])
def test_lengths_are_those_of_the_layout(shared, size):
    example = PAIR._replace(prompt=PAIR.prompt[:size])
    flat = examples.stored([example, PAIR])
    expected = [len(lay_out(each, "pairs", shared)["tokens"]) for each in (example, PAIR)]
    assert examples.lengths(flat, shared).tolist() == expected
    assert examples.length(size, [2, 1], shared) == expected[0]
    assert listed(lay_out(examples.reader(flat)(1), "pairs", shared)) == listed(lay_out(PAIR, "pairs", shared))


def test_pairs_pack_into_one_row_and_count_on():
    rows = [pair("q", "a", "bc"), pair("p", "x", "y")]
    encoded = encode(rows)
    row = source.rows(encoded.examples, encoded.lengths, 16, seed=0)[0]
    # "qa</s>" and "qbc</s>", then "px</s>" and "py</s>": 3 + 4 + 3 + 3 tokens.
    assert row["segments"].tolist() == [1] * 3 + [2] * 4 + [3] * 3 + [4] * 3 + [0] * 3
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 0, 0]
    assert row["mask"].tolist() == [False, True, True, False] + [True] * 3 + [False, True, True] * 2 + [False] * 3
    with pytest.raises(ValueError, match="2 examples of 13 tokens do not fit a window of 12"):
        pack.pack([encoded.examples[0], encoded.examples[1]], 12)


# ---- the boundary


def test_what_an_answer_merges_with_the_prompt_is_the_answers():
    tokenizer = byte_pairs(PLAIN)
    (example,) = [encode([pair("ab", "cx", "dx")], tokenizer=tokenizer, template=None).examples[0]]
    assert texts(example, tokenizer) == ["a⟦bcx<|endoftext|>⟧", "a⟦bdx<|endoftext|>⟧"]
    ids = [document["tokens"].tolist() for document in examples.documents(example)]
    assert ids[0] == tokenizer("abcx<|endoftext|>")["input_ids"] and ids[1] == tokenizer("abdx<|endoftext|>")["input_ids"]
    shared = encode([pair("xab", "cx", "dx")], tokenizer=tokenizer, template=None, shared=True).examples[0]
    assert shared["branches"].tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert shared["mask"].tolist() == [False, False, True, True, True, False, True, True, True, True]


def test_equal_beginnings_of_answers_are_no_prompt():
    (example,) = [encode([pair("q", "same a", "same b")]).examples[0]]
    assert texts(example, characters()) == ["q⟦same a</s>⟧", "q⟦same b</s>⟧"]


def test_only_the_assistant_is_learned_in_an_answer_of_several_turns():
    turns = [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "s"))]
    row = {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": ""}]}
    assert texts(encode([row]).examples[0], characters()) == ["q⟦a</s>⟧r⟦s</s>⟧", "q⟦</s>⟧"]
    assert texts(encode([row], train_on="last").examples[0], characters()) == ["qa</s>r⟦s</s>⟧", "q⟦</s>⟧"]


# ---- labels, ratings, margins


def test_labelled_answers_stand_alone_and_mismatched_ones_beside_them():
    rows = [{"prompt": p, "completion": c, "label": v} for p, c, v in (("p", "a", True), ("q", "b", False), ("q", "c", True))]
    alone = encode(rows, "labelled")
    assert [texts(alone.examples[i], characters()) for i in range(3)] == [["p⟦a</s>⟧"], ["q⟦b</s>⟧"], ["q⟦c</s>⟧"]]
    assert [alone.examples[i]["labels"][0] for i in range(3)] == [1, 0, 1]
    both = encode(rows, "mismatched")
    # The answer before, going round; the third's neighbour has its own prompt, so it takes the neighbour's.
    found = [texts(both.examples[i], characters())[1] for i in range(3)]
    assert found == ["p⟦c</s>⟧", "q⟦a</s>⟧", "q⟦a</s>⟧"]
    assert both.examples[1]["labels"].tolist() == [0, 0, 0, -1, -1, -1]
    with pytest.raises(UserError, match="line 1: there is no other prompt whose answer could be its mismatch"):
        encode(rows[1:], "mismatched")


def test_a_score_is_its_answers_label():
    rows = [{"prompt": "q", "completion": "a", "score": 2.5}, {"messages": conversation("r", "s"), "score": -1}]
    scored = encode(rows, "scored")
    assert [texts(scored.examples[i], characters()) for i in range(2)] == [["q⟦a</s>⟧"], ["r⟦s</s>⟧"]]
    assert [scored.examples[i]["labels"].tolist() for i in range(2)] == [[2.5] * 3, [-1] * 3]
    named = {"prompt": "q", "completion": "a", "helpfulness": 4}
    columns = {"prompt": "prompt", "completion": "completion", "score": "helpfulness"}
    assert encode([named], "scored", columns=columns).examples[0]["labels"].tolist() == [4] * 3


def test_ratings_make_the_best_and_the_worst_a_pair():
    row = {"prompt": "q", "completions": ["a", "b", "c"], "ratings": [1, 5.5, 2]}
    found = formats.pair(Record(row, "p"))
    assert (found.chosen_messages[0]["content"], found.rejected_messages[0]["content"], found.margin) == ("b", "a", 4.5)
    assert formats.pair(Record(pair("q", "a", "b", score_chosen=3, score_rejected=1), "p")).margin == 2
    assert formats.pair(Record(pair("q", "a", "b", margin="large"), "p")).margin is None
    assert encode([row], reads=["margins"]).examples[0]["margins"].tolist() == [4.5] * 6
    wrong = (([1, 1, 1], "the ratings tell no answer"), ([1, 2], "of the same length"), ([1, 2, "3"], "no number"))
    for ratings, message in wrong:
        with pytest.raises(UserError, match=f"line 1: .*{message}"):
            encode([row | {"ratings": ratings}])


STEPS = {"prompt": "pq", "completions": ["ab", " c", "d"], "labels": [True, False, True]}


def test_a_steps_label_stands_where_the_step_ends():
    encoded = encode([STEPS], "steps")
    assert listed(encoded.examples[0]) == {
        "tokens": characters()("pqab\n c\nd</s>", add_special_tokens=False)["input_ids"],
        "mask": [False, False, False, True, False, False, True, False, True, False],
        "segments": [1] * 10,
        "positions": list(range(10)),
        "labels": [-1, -1, -1, 1, -1, -1, 0, -1, 1, -1],
    }
    assert encoded.lengths.tolist() == [10] and encoded.learned.tolist() == [3]
    both = encode([{"prompt": "p", "completions": ["x"], "labels": [False]}, STEPS], "steps")  # the second one's place
    assert listed(both.examples[1]) == listed(encoded.examples[0]) and both.examples[0]["labels"].tolist() == [-1, 0, -1]
    cut = encode([STEPS], "steps", window=8, too_long="truncate")
    assert cut.examples[0]["labels"].tolist() == [-1, -1, -1, 1, -1, -1, 0, -1], "a step that is cut off has no label"
    with pytest.raises(UserError, match="within a window of 3 .*; the shortest needs 4"):
        encode([STEPS], "steps", window=3, too_long="truncate")
    assert encode([STEPS | {"labels": [True] * 3}], "steps").digest != encoded.digest


def test_a_steps_end_is_found_in_tokens_that_merge_and_in_a_template_that_trims():
    tokenizer = byte_pairs(PLAIN.replace("m['content']", "m['content'] | trim"))
    row = {"prompt": "a", "completions": [" b\n", "\nbc "], "labels": [True, False]}
    encoded = encode([row], "steps", tokenizer=tokenizer, template=None)
    assert texts(encoded.examples[0], tokenizer) == ["a⟦b⟧\n⟦bc⟧<|endoftext|>"]
    joined = PLAIN.replace("m['content']", "m['content'] | replace('\n', '')")
    with pytest.raises(UserError, match="line 1: the chat template changes the answer, so its steps are not found"):
        encode([STEPS], "steps", template=joined)
    merging = characters()
    merging.add_tokens(["b\n c"])
    with pytest.raises(UserError, match="line 1: one token ends two steps"):
        encode([STEPS], "steps", tokenizer=merging)


BAD = {
    "no rejected": (pair("q", "a", None), "pairs", "there is no rejected answer beside the chosen one"),
    "no chosen": ({"prompt": "q", "rejected": "a"}, "pairs", "there is no chosen answer beside the rejected one"),
    "equal": (pair("q", "a", "a"), "pairs", "chosen and rejected are the same answer"),
    "no prompt": (pair(" ", "a", "b"), "pairs", "the prompt is empty"),
    "a demonstration": ({"prompt": "q", "completion": "a"}, "pairs", "columns prompt, completion hold none to compare"),
    "a number for a label": ({"prompt": "q", "completion": "a", "label": 1}, "labelled", "label is 1, not true or false"),
    "no label": ({"prompt": "q", "completion": "a"}, "labelled", "there is no label, true or false"),
    "a label of what is no answer": ({"question": "q", "answer": "a", "label": True}, "labelled", "no answer to judge in the"),
    "text for a score": ({"prompt": "q", "completion": "a", "score": "2"}, "scored", "score is '2', not a number"),
    "a verdict for a score": ({"prompt": "q", "completion": "a", "label": True}, "scored", "there is no score, a number"),
    "no steps": ({"prompt": "q", "completion": "a", "label": True}, "steps", "there is no column completions"),
    "a step without a label": (STEPS | {"labels": [True, False]}, "steps", "must be lists of the same length"),
    "an empty step": (STEPS | {"completions": ["ab", " ", "d"]}, "steps", "step 2 is ' '; write text"),
    "a number for a step's label": (STEPS | {"labels": [True, True, 0]}, "steps", "the label of step 3 is 0; write true"),
    "no prompt to steps": (STEPS | {"prompt": ""}, "steps", "the prompt is empty"),
    "a number for an answer": (pair("q", "a", 3), "pairs", "rejected is 3, neither text nor a list of messages"),
    "no prompt to a label": ({"prompt": "", "completion": "a", "label": True}, "labelled", "the prompt is empty"),
    "an unknown column": ({"x": 1}, "pairs", "the row's columns x hold none to compare"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_stop_with_their_place_or_are_counted(kind):
    row, row_type, message = BAD[kind]
    judged = {"prompt": "q", "completion": "a", "label": True, "score": 1}
    good = [{"pairs": pair("q", "a", "b"), "steps": STEPS}.get(row_type, judged)]
    with pytest.raises(UserError, match=f"d.jsonl, line 2: .*{message}"):
        encode([*good, row], row_type)
    encoded = encode([*good, row], row_type, bad_rows="skip")
    assert encoded.report["count"] == encoded.report["skipped"] == 1 and message in encoded.reason


def test_a_verdict_that_the_named_columns_leave_out_is_told():
    row = {"ask": "q", "say": "a", "label": True}
    named = {"prompt": "ask", "completion": "say"}
    with pytest.raises(UserError, match="config.columns leaves it out, so say label=label there too"):
        encode([row], "labelled", columns=named)
    assert encode([row], "labelled", columns=named | {"label": "label"}).examples[0]["labels"].tolist() == [1] * 3


def test_settings_that_mean_nothing_for_pairs_are_refused():
    rows = [pair("q", "a", "b")]
    for options, message in (
        ({"train_on": "all"}, "config.train_on: 'all' of a prompt with judged answers"),
        ({"too_long": "split"}, "pieces of a judged answer cannot be judged"),
        ({"reads": ["margins"]}, "line 1: the objective reads margins, and there is no number under margin"),
    ):
        with pytest.raises(UserError, match=message):
            encode(rows, **options)


# ---- the window


def test_a_pair_too_long_is_refused_cut_at_its_answers_ends_or_dropped():
    rows = [pair("pq", "abcdef", "xy"), pair("p", "a", "b")]
    whole = "the prompt with both answers has 14 tokens and the window 11; make the window 14 or longer, or say"
    with pytest.raises(UserError, match=f"line 1: {whole}"):
        encode(rows, window=11)
    cut = encode(rows, window=11, too_long="truncate")
    assert texts(cut.examples[0], characters()) == ["pq⟦abcd⟧", "pq⟦xy</s>⟧"], "the longer answer gives, the prompt never"
    assert (cut.report["truncated"], cut.report["count"]) == (1, 2)
    shared = encode(rows, window=11, too_long="truncate", shared=True)
    assert texts(shared.examples[0], characters()) == ["pq⟦abcde⟧", "pq⟦xy</s>⟧"], "the prompt is there once: one token more"
    assert encode(rows, window=11, too_long="drop").report["dropped"] == 1
    long = encode(rows, window=64, longest=5, too_long="truncate")
    assert texts(long.examples[0], characters()) == ["pq⟦abc⟧", "pq⟦xy</s>⟧"], "no document is longer than the model takes"
    for window in (64, 8):
        with pytest.raises(UserError, match="line 1: a document of 9 tokens, and the model takes 5; say"):
            encode(rows, window=window, longest=5)
    with pytest.raises(UserError, match=r"none of the 1 examples .* window of 4 .*; the shortest needs 6"):
        encode(rows[:1], window=4, too_long="truncate")
    with pytest.raises(
        UserError, match=r"none of the 1 examples .* window of 64 .*; the model takes documents of 2, and all are"
    ):
        encode(rows[:1], window=64, longest=2, too_long="truncate")
    same = encode([pair("p", "aaab", "aaac"), pair("p", "a", "b")], window=8, too_long="truncate")
    assert same.report["dropped"] == 1, "cut down to what both begin with, there is nothing to compare"


# ---- a stage

MODEL = {"model_type": "llama", "vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
MODEL |= {"num_attention_heads": 2, "max_position_embeddings": 16}


@objective(rows="pairs", columns={"ref_logps": ("BS", "float32")})
def compared(forward, params, batch, key):
    """An objective of pairs, never called here."""


@objective(rows="pairs", columns=lambda margins=True: {"margins": ("BS", "float32")} if margins else {})
def told_apart(forward, params, batch, key, *, margins: bool = True):
    """One whose columns its keyword decides."""


def plan(tmp_path, rows, objective=compared, **changes):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": MODEL, "tokenizer": "test_pairs.characters", "template": PLAIN, "data": str(file), "objective": objective}
    ((name, s),) = recipe.stages(recipe.opened(None, **{**given, "window": 32, "batch_size": 8, **changes}))
    mesh = sharding.make_mesh()
    return plan_stage(name, s, mesh), s


ROWS = [pair("q" * (1 + i % 3), "a" * (1 + i % 4), "b", margin=i) for i in range(40)]


def test_a_stage_learns_from_the_row_type_that_its_objective_says(tmp_path):
    for loss, changes, more in (
        (compared, {}, set()),
        (compared, {"shared_prefix": True}, {"branches"}),
        (told_apart, {}, {"margins"}),
        ({"name": told_apart, "margins": False}, {}, set()),
    ):
        made, s = plan(tmp_path, ROWS, loss, held_out=8, **changes)
        batch = made.source(None) | scalars(0, 1)
        assert batch.keys() == {"tokens", "mask", "segments", "positions", "step", "progress", *more}
        shapes = {k: (x.shape, x.dtype) for k, x in columns(s, made.objective).items()}
        assert {k: v for k, v in shapes.items() if k != "ref_logps"} == {k: (x.shape, x.dtype) for k, x in batch.items()}
        assert ("ref_logps" in shapes) == (loss is compared)
        assert (
            (batch["segments"].max(axis=1) % 2 == 0).all() and len(datasets.shown(made.sets)) == 2 and len(made.held_out) == 1
        )
    digests = {plan(tmp_path, rows, **kw)[0].data for rows in (ROWS, ROWS[::-1]) for kw in ({}, {"shared_prefix": True})}
    assert len(digests) == 4


def test_batches_of_pairs_resume_by_their_number(tmp_path):
    made, _ = plan(tmp_path, ROWS, epochs=3)
    batches = [made.source(None) for _ in range(len(made.source))]
    again, _ = plan(tmp_path, ROWS, epochs=3)
    again.source.position = 1
    for expected in batches[1:]:
        found = again.source(None)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_stage_refuses_what_does_not_go_with_its_row_type(tmp_path):
    demonstrations = [{"prompt": "q", "completion": "a"}] * 8

    @objective(rows="pair")
    def wrong(forward, params, batch, key):
        """Names a row type that is none."""

    @objective(rows="steps")
    def steps(forward, params, batch, key):
        """Learns from what no completion of its own is."""

    long = {**family_cases.config("phi3/long"), "vocab_size": 99}
    for rows, changes, message in (
        (demonstrations, {"objective": "sft.nll", "shared_prefix": True, "window": 16}, "config.shared_prefix: only a prompt"),
        (demonstrations, {}, "d.jsonl, line 1: the objective compares two answers"),
        (ROWS, {"objective": "sft.nll", "window": 16}, "a pair of answers, chosen and rejected, which only"),
        ([pair("q" * 20, "a", "b")] * 8, {"window": 64}, "line 1: a document of 22 tokens, and the model takes 16"),
        (ROWS, {"model": long, "shared_prefix": True}, "beyond 4 tokens a document's length decides"),
        (ROWS, {"objective": wrong}, "config: unknown module 'pair' for row_types. Did you mean 'pairs'"),
        (
            ROWS,
            {"source": "rollouts", "data": "", "window": 512, "objective": steps},
            "config.source: the objective learns from steps of a data set",
        ),
    ):
        with pytest.raises(UserError, match=message):
            plan(tmp_path, rows, **changes)


# ---- real files

FILES = {"hh-rlhf/harmless_base.jsonl.gz": "pairs", "llamafactory/dpo_en_demo.json": "pairs"}
FILES |= {"llamafactory/kto_en_demo.json": "mismatched"}


@pytest.mark.parametrize("file", FILES)
def test_real_files(shared, file):
    found = readers.read(str(shared / "data" / file))[:100]
    tokenizer, row_type = load(shared / "models" / "stories260k"), FILES[file]
    options = {"window": 10**6, "row_type": row_type, "bad_rows": "skip"}
    apart = encoding.encode_all(found, tokenizer, **options)
    once = encoding.encode_all(found, tokenizer, shared=True, **options)
    assert apart.report["count"] >= 90 and apart.report["count"] == once.report["count"]
    assert apart.learned.tolist() == once.learned.tolist() and (once.lengths < apart.lengths).all()
    for i in range(apart.report["count"]):
        one, other = examples.documents(apart.examples[i])
        starts = [int(np.argmax(document["mask"])) for document in (one, other)]
        assert starts[0] == starts[1] and np.array_equal(one["tokens"][: starts[0]], other["tokens"][: starts[0]])
        assert one["tokens"][-1] == other["tokens"][-1] == tokenizer.eos_token_id and one["mask"][-1] and other["mask"][-1]
        for document, same in zip((one, other), examples.documents(once.examples[i]), strict=True):
            assert listed(document) == listed(same)


def test_sets_of_a_mixture_have_a_digest_of_all(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[: 30 if name == "a" else 20]))
    made, _ = plan(tmp_path, ROWS, data=f"{tmp_path}/a.jsonl=1,{tmp_path}/b.jsonl=3", held_out=8)
    own = [one.encoded.digest for one in made.sets if not one.held_out]
    assert made.data == datasets.digest(made.sets) == mixture.digest(own, [1.0, 3.0]) and len(made.sets) == 4


def test_a_pair_that_is_equal_once_cut_is_dropped_and_counted_as_that(capsys):
    rows = [pair("p", "aaab", "aaac"), pair("p", "a", "b"), pair("p" * 9, "a", "b")]
    encoded = encode(rows, window=8, too_long="truncate")
    assert (encoded.report["count"], encoded.report["dropped"], encoded.report["equal"]) == (1, 2, 1)
    mixture.report("data d.jsonl", mixture.Part("d.jsonl", None, [], []), encoded, 1, 8, 8)
    printed = capsys.readouterr().err
    assert ", 2 dropped, 1 of them pairs whose answers are equal once cut (for their length:" in printed
    assert "equal" not in encode(rows, window=8, too_long="drop").report, "nothing is cut"
    with pytest.raises(UserError, match="none of the 1 examples has something to learn .*1 are pairs whose answers are equal"):
        encode(rows[:1], window=8, too_long="truncate")


def test_a_turn_of_an_answer_marked_not_to_be_learned_is_not():
    tokenizer = characters()
    answer = [{"role": "assistant", "content": "no", "weight": 0}, *conversation("u", "yes")]
    rows = [pair([{"role": "user", "content": "q"}], answer, [{"role": "assistant", "content": "b"}])]
    shown = texts(encode(rows, tokenizer=tokenizer).examples[0], tokenizer)
    assert shown == ["qno</s>u⟦yes</s>⟧", "q⟦b</s>⟧"]
    marked = {"prompt": rows[0]["prompt"], "completion": answer, "label": True}
    assert texts(encode([marked], "labelled", tokenizer).examples[0], tokenizer) == ["qno</s>u⟦yes</s>⟧"]
    with pytest.raises(
        UserError, match="line 1: every turn of the answer is marked as not to be learned; remove the row or a mark"
    ):
        encode([marked | {"completion": answer[:1]}], "labelled", tokenizer)
