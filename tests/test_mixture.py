"""Several sources in one stream, and rows that are left out on request: what is mixed, how much of it, and what is said of it.

The rows of a mixture carry the number of their source, so shares, epochs and resumption are counted exactly.
"""

import json

import grain
import numpy as np
import pytest
import runs
from toy_tokenizers import characters

from jaxpost import recipe, sharding
from jaxpost.data import chat, encoding, mixture, source, templates
from jaxpost.data.readers import Record
from jaxpost.errors import UserError
from jaxpost.stages import datasets
from jaxpost.stages.plan import plan_stage


def sources(*lengths):
    """Datasets whose rows say which source they are of and their number in it."""
    return [grain.MapDataset.range(n).map(lambda i, k=k: {"tokens": np.array([k, i])}) for k, n in enumerate(lengths)]


def drawn(dataset, stop, start=0):
    return [tuple(dataset[i]["tokens"].tolist()) for i in range(start, stop)]


@pytest.mark.parametrize(
    ("lengths", "weights", "epoch"),
    [
        ((6, 2), (3, 1), 8),  # in proportion: everything once
        ((5, 5), (1, 1), 10),
        ((10, 2), (1, 1), 20),  # the small one five times
        ((3, 30), (0.75, 0.25), 120),  # the large one once, thirty times the small
        ((1, 1), (1, 9), 10),
        ((7, 3, 11), (0.5, 0.2, 0.3), 37),
    ],
)
def test_an_epoch_ends_when_every_source_has_been_gone_through(lengths, weights, epoch):
    mixed = mixture.mix(sources(*lengths), weights, seed=0)
    rows = drawn(mixed, len(mixed))
    counts = [sum(k == source for source, _ in rows) for k in range(len(lengths))]
    for k, length in enumerate(lengths):
        own = [i for source, i in rows if source == k]
        for first in range(0, len(own) - length + 1, length):
            assert sorted(own[first : first + length]) == list(range(length)), "each time through is a permutation"
    assert all(count >= length for count, length in zip(counts, lengths, strict=True))
    last, _ = rows[-1]
    assert counts[last] == lengths[last], "one row less would leave one out"
    assert abs(len(mixed) - epoch) <= max(sum(weights) / w for w in weights), "where exactly depends on how ties fall"


def test_shares_are_those_of_the_weights_in_every_stretch():
    rows = drawn(mixture.mix(sources(40, 40, 40), (5, 3, 2), seed=0), 400)
    for start in range(0, 400, 10):
        counts = np.bincount([k for k, _ in rows[start : start + 10]], minlength=3)
        assert abs(counts - [5, 3, 2]).max() <= 1
    assert np.bincount([k for k, _ in rows]).tolist() == [200, 120, 80]


def test_a_mixture_is_a_function_of_the_seed_and_goes_on_past_its_epoch():
    first, again, other = (mixture.mix(sources(9, 4), (2, 1), seed) for seed in (3, 3, 4))
    assert drawn(first, 13) == drawn(again, 13) != drawn(other, 13)
    two = first.repeat(2)
    assert len(two) == 2 * len(first)
    rows = drawn(two, len(two))
    assert rows[: len(first)] != rows[len(first) :], "the second epoch is permuted anew"
    same = mixture.mix(sources(30, 30), (1, 1), seed=0)
    orders = [[i for source, i in drawn(same, 60) if source == k] for k in (0, 1)]
    assert orders[0] != orders[1], "sources do not share a permutation"


def test_a_mixture_resumes_at_any_batch():
    def batches():
        return source.Batches(mixture.mix(sources(7, 5), (2, 1), 1), 4, seed=1, shuffle=False, epochs=3)

    whole = batches()
    expected = [whole()["tokens"].tolist() for _ in range(len(whole))]
    for position in (1, 4, len(whole) - 1):
        later = batches()
        later.position = position
        assert [later()["tokens"].tolist() for _ in range(position, len(later))] == expected[position:]


def test_sources_are_named_in_a_string_a_list_or_a_dict(tmp_path):
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c=1,d.jsonl")]
    for number, name in enumerate(names):
        with open(name, "w") as file:
            file.write(json.dumps({"text": str(number)}) + "\n")
    a, b, c = names

    def found(data):
        return [(part.weight, [r.row["text"] for r in part.records]) for part in mixture.read(data, "data", False)]

    assert found(a) == found([a]) == found(f"{a},") == [(None, ["0"])]
    assert found(f"{a}, {b}") == found([a, b]) == [(None, ["0", "1"])]
    weighted = [(3.0, ["0"]), (0.5, ["1"])]
    assert found(f"{a}=3,{b}=0.5") == found({a: 3, b: 0.5}) == found([(a, 3), [b, 0.5]]) == weighted
    assert found([c]) == [(None, ["2"])] and found({c: 1}) == [(1, ["2"])]
    cases = [
        (f"{a}=3,{b}", f"config.data: {b!r} has no weight, as others have; give all one or none"),
        (f"{a}=0", "config.data: weights must be above 0, and are [0.0]"),
        ({a: float("nan")}, "config.data: weights must be above 0"),
        (" , ", "config.data: names no source"),
        ([a, 3], "config.data: 3 is neither a path nor a path with its weight"),
        ([(a, True)], "is neither a path nor a path with its weight"),
    ]
    for data, message in cases:
        with pytest.raises(UserError) as error:
            mixture.read(data, "data", False)
        assert message in str(error.value)


def test_pairs_of_a_setting():
    text = 'a=true, b=False,c=3,d=x y,e="4"'
    assert mixture.pairs(text, "k") == {"a": True, "b": False, "c": 3, "d": "x y", "e": "4"}
    assert mixture.pairs("", "k") == {} and mixture.pairs({"a": None}, "k") == {"a": None}
    for wrong in ("a", "=b", "a="):
        with pytest.raises(UserError, match=f"config.k: '{wrong}' is no pair; write name=value"):
            mixture.pairs(wrong, "k")


def test_bad_rows_are_skipped_and_counted_and_long_ones_are_another_matter():
    texts = ["ab", "", "cdefgh", None, "i"]
    records = [Record({"text": text}, f"t, line {n}") for n, text in enumerate(texts, start=1)]
    options = {"window": 5, "bad_rows": "skip"}
    for _ in range(2):  # from the encoder, and from its cache
        encoded = encoding.encode_all(records, characters(), too_long="drop", **options)
        assert encoded.report | {"tokens": 0, "trained_tokens": 0} == {
            "count": 2, "dropped": 1, "truncated": 0, "split": 0, "skipped": 2, "tokens": 0, "trained_tokens": 0,
        }  # fmt: skip
        assert encoded.reason.startswith("t, line 2: text is empty") and encoded.lengths.tolist() == [4, 3]
    with pytest.raises(UserError, match="t, line 3: the example has 8 tokens"):
        encoding.encode_all(records, characters(), **options)
    with pytest.raises(UserError, match="t, line 2: text is empty"):
        encoding.encode_all(records, characters(), window=5, too_long="drop")
    with pytest.raises(UserError, match="none of the 2 examples can be learned from; the first because: t, line 2"):
        encoding.encode_all([records[1], records[3]], characters(), **options)
    with pytest.raises(UserError, match="bad_rows='drop' is not known; choose one of stop, skip"):
        encoding.encode_all(records, characters(), window=5, bad_rows="drop")


def test_the_hint_stands_where_it_belongs(capsys):
    def told(longest=8, **counts):
        report = dict.fromkeys(("count", "dropped", "truncated", "split", "skipped", "tokens", "trained_tokens"), 0) | counts
        encoded = encoding.Encoded([], np.zeros(0), np.zeros(0), report, "", "because", 0)
        mixture.report("data", mixture.Part("p", None, [], []), encoded, 3, 8, longest)
        return capsys.readouterr().err.partition("3 rows of 8")[2].strip()

    hint = " (for their length: config.window, config.too_long)"
    assert told(truncated=2, dropped=1, skipped=4) == f", 2 truncated, 1 dropped{hint}, 4 skipped; the first skipped: because"
    assert told(longest=7, dropped=1) == ", 1 dropped" + hint.replace(")", "; the model takes 7 tokens)")
    assert told(truncated=2) == f", 2 truncated{hint}" and told(split=2) == ", 2 split" and told() == ""


# ---- a stage's plan


def plan(folder, **changes):
    config = recipe.make(**runs.settings(folder, **{"held_out": 0, "task": {}, **changes}))
    mesh = sharding.make_mesh()
    with sharding.use(mesh):
        return plan_stage("train", dict(recipe.stages(config))["train"], mesh)


def digits(folder, name, letter, count, *more):
    """A file of texts with 16 tokens each, two of which fill a row of the window."""
    rows = [{"text": letter * 15}] * count
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + "".join(more))
    return str(folder / name)


def letters(batch, tokenizer):
    return [tokenizer.decode(row[:1].tolist()) for row in batch["tokens"]]


def test_seeds_share_their_held_out_rows(tmp_path):
    rows = [{"text": f"{i:03}"} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sets(seed, split_seed=0, **changes):
        made = plan(
            tmp_path,
            **{
                "data": str(tmp_path / "rows.jsonl"),
                "held_out": 8,
                "steps": 1,
                **changes,
                "seed": seed,
                "split_seed": split_seed,
            },
        )
        return [one.encoded.digest for one in made.sets], made.source()["tokens"].tolist()

    (first, order), (second, other), (third, _) = sets(0), sets(1), sets(1, split_seed=1)
    assert first == second != third and order != other
    # Demonstrations of a task are a data set like any other.
    drawn = {"data": "", "task": runs.settings(tmp_path)["task"]}
    assert sets(0, **drawn)[0] == sets(1, **drawn)[0] != sets(1, 1, **drawn)[0]


def test_a_stage_mixes_its_sources(tmp_path, capsys):
    data = {digits(tmp_path, "a.jsonl", "1", 64): 3, digits(tmp_path, "b.jsonl", "2", 8): 1}
    made = plan(tmp_path, data=data)
    assert len(made.source) == made.steps == -(-42 // 16), "32 rows of a.jsonl, and one of b.jsonl after each three"
    shares = [letters(made.source(), made.spec.tokenizer).count("1") for _ in range(2)]
    assert shares == [12, 12]
    said = capsys.readouterr().err
    assert "data " + str(tmp_path / "b.jsonl") in said and "an epoch of the mixture has 4" in said
    digest = made.data
    assert plan(tmp_path, data=data).data == digest
    others = [dict(zip(data, weights, strict=True)) for weights in ((3, 2), (1, 3))] + [dict(reversed(data.items()))]
    assert len({digest, *(plan(tmp_path, data=other).data for other in others)}) == 4
    assert plan(tmp_path, data=data, steps=7).steps == 7
    command = ",".join(f"{path}={weight}" for path, weight in data.items())
    assert plan(tmp_path, data=command).data == digest


def test_held_out_rows_come_from_all_sources_and_are_trained_on_by_none(tmp_path):
    a, b = digits(tmp_path, "a.jsonl", "1", 40), digits(tmp_path, "b.jsonl", "2", 40)
    made = plan(tmp_path, data={a: 1, b: 1}, held_out=0.5, packing=False)
    held = [letter for batch in made.held_out for letter in letters(batch, made.spec.tokenizer)]
    count = {letter: held.count(letter) for letter in "12"}
    assert sum(count.values()) == 40 and min(count.values()) > 10
    assert len(made.source) * 16 >= 2 * (40 - min(count.values())), "the rest of the smaller share is gone through as well"
    named = plan(tmp_path, data={a: 1, b: 1}, eval_data=[a, b], packing=False)
    assert sum(bool(row.any()) for batch in named.held_out for row in batch["tokens"]) == 80
    with pytest.raises(UserError, match="config.eval_data: evaluation takes every row once; leave the weights out"):
        plan(tmp_path, data=a, eval_data={a: 1})
    with pytest.raises(UserError, match=r"config.held_out: leaves nothing of .*c.jsonl to train on"):
        plan(tmp_path, data={a: 1, digits(tmp_path, "c.jsonl", "3", 1): 1}, held_out=40)


def test_bad_rows_of_a_stage_stop_it_or_are_told(tmp_path, capsys):
    data = digits(tmp_path, "a.jsonl", "1", 40, "{broken\n", '{"text": "no digits"}\n', '{"reply": 1}\n')
    with pytest.raises(UserError, match="a.jsonl, line 41, column 2: broken JSON"):
        plan(tmp_path, data=data)
    made = plan(tmp_path, data=data, bad_rows="skip")
    said = capsys.readouterr().err
    assert (
        "40 examples, 640 tokens (600 learned)" in said
        and "3 skipped" in said
        and "the first skipped: a.jsonl, line 41" in said
    )
    assert len(made.source) == -(-20 // 16)
    with pytest.raises(UserError, match="config.bad_rows: 'ignore' is neither 'stop' nor 'skip'"):
        plan(tmp_path, data=data, bad_rows="ignore")


def test_a_held_out_part_of_no_use_is_no_reason_to_give_the_data_up(tmp_path):
    data = digits(tmp_path, "a.jsonl", "1", 2, '{"text": "' + "1" * 40 + '"}\n')  # of three, the seed holds out the last
    for changes, what, remedy in (
        ({"held_out": 1}, "eval data", "; config.held_out=0 keeps none out"),
        ({"window": 8}, "data", ""),
    ):
        with pytest.raises(UserError, match=rf"^{what} .*a.jsonl: none of the .*; the shortest needs \d+{remedy}$"):
            plan(tmp_path, data=data, too_long="drop", **changes)


def test_columns_and_template_options_from_the_command_line_or_a_recipe(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"ask": "1+1", "reply": "2"}\n' * 16)
    template = "{{ '-' if x }}{% for m in messages %}{{ m.content }}{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}"
    base = {"data": str(tmp_path / "a.jsonl"), "template": template}
    for columns in ("question=ask,answer=reply", {"question": "ask", "answer": "reply"}):
        made = plan(tmp_path, **base, columns=columns)
        assert made.spec.tokenizer.decode(datasets.shown(made.sets)[0]["tokens"].tolist()) == "1+12<|end|>"
    for options in ("x=true", {"x": True}):
        made = plan(tmp_path, **base, columns="question=ask,answer=reply", template_options=options)
        assert made.spec.tokenizer.decode(datasets.shown(made.sets)[0]["tokens"].tolist()) == "-1+12<|end|>"
    with pytest.raises(UserError, match=r"a.jsonl, line 1: columns not recognised: ask, reply; .*config.columns="):
        plan(tmp_path, **base)
    with pytest.raises(UserError, match="config.template_options: the chat template reads no variable 'y'"):
        plan(tmp_path, **base, columns="question=ask,answer=reply", template_options="y=1")
    with pytest.raises(UserError, match=r"config.columns: 3 is no str or dict"):
        plan(tmp_path, columns=3)
    own = {"columns": {"text": "b"}, "data": {"a.jsonl": 1}}
    (_, one), (_, two) = recipe.stages(recipe.make(stages=("one", "two"), columns={"prompt": "a"}, one=own))
    assert one.columns.to_dict() == {"text": "b"} and one.data == (("a.jsonl", 1),), "a stage's own replaces"
    assert two.columns.to_dict() == {"prompt": "a"}


# ---- real data

FILES = {
    "gsm8k/train.jsonl": {},
    "humaneval/HumanEval.jsonl.gz": {"completion": "canonical_solution"},
    "hh-rlhf/harmless_base.jsonl.gz": {"messages": "chosen"},
    "llamafactory/alpaca_en_demo.json": {},
    "llamafactory/dpo_en_demo.json": {"prompt": "conversations", "completion": "chosen"},
    "llamafactory/glaive_toolcall_en_demo.json": {},
    "llamafactory/kto_en_demo.json": {"messages": "messages"},
    "llamafactory/reason_tool_use_demo_50.jsonl": {},
    "llamafactory/v1_sft_demo.jsonl": {},
    "llamafactory/wiki_demo.txt": {},
}
KINDS = {"hh-rlhf/harmless_base.jsonl.gz": "Preference", "llamafactory/dpo_en_demo.json": "Preference"}
KINDS |= {"llamafactory/kto_en_demo.json": "Rated"}


def test_columns_that_are_not_learned_from_are_named(capsys):
    row = {"prompt": "a", "completion": "b", "thinking": "t", "note": None, "mine": 1, "tools": []}
    records = [Record(row | {f"c{i}": i for i in range(3)}, "p")]
    encoded = encoding.encode_all(records, characters(), window=9)
    for columns, told in ((["mine"], "thinking, c0, c1, c2"), ([], "thinking, mine, c0, c1, c2")):
        mixture.report("data d", mixture.Part("d", None, records, []), encoded, 1, 9, 9, columns)
        assert f"data d: columns that are not learned from: {told}\n" in capsys.readouterr().err
    mixture.report("eval data d", mixture.Part("d", None, records, []), encoded, 1, 9, 9)
    assert "columns" not in capsys.readouterr().err


def test_all_real_files_are_recognised_and_learned_from(shared):
    from jaxpost import tokenizer
    from jaxpost.data import formats, readers

    own = tokenizer.load(shared / "models" / "stories260k")
    present = {str(p.relative_to(shared / "data")) for p in (shared / "data").rglob("*.*") if p.is_file()}
    assert present == set(FILES), "a file that no test knows"
    skipped = {}
    for name, columns in FILES.items():
        records = readers.read(str(shared / "data" / name))
        kinds = {type(formats.recognise(record)).__name__ for record in records} if name in KINDS else set()
        assert kinds <= {KINDS.get(name)}, name
        few = records[:120]
        encoded = encoding.encode_all(few, own, window=100_000, columns=columns, bad_rows="skip")
        skipped[name] = encoded.report["skipped"]
        assert encoded.report["count"] + skipped[name] == len(few) and encoded.report["trained_tokens"] > 0
    assert {name: n for name, n in skipped.items() if n} == {"hh-rlhf/harmless_base.jsonl.gz": 1}, "an empty chosen answer"


def test_real_tool_turns_are_masked_exactly(shared):
    from jaxpost import tokenizer
    from jaxpost.data import formats, readers

    own = tokenizer.load(shared / "models" / "stories260k")
    for name in ("glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl"):
        records = readers.read(str(shared / "data" / "llamafactory" / name))
        for record in records[:: len(records) // 12]:
            example = formats.recognise(record)
            found = chat.encode(example, own)
            expected = [m["content"] for m in templates.adapted(example, own).messages if m["role"] == "assistant"]
            learned = own.decode(found["tokens"][found["mask"]].tolist(), clean_up_tokenization_spaces=False)
            assert learned == "".join(content + "</s>" for content in expected), record.place
            tools = [m["content"] for m in example.messages if m["role"] == "tool"]
            whole = own.decode(found["tokens"].tolist(), clean_up_tokenization_spaces=False)
            assert all(said in whole and said not in learned for said in tools), record.place
            calls = [c["function"]["name"] for m in example.messages for c in m.get("tool_calls", ())]
            assert len(calls) == learned.count("<tool_call>") and all(f'"name": "{call}"' in learned for call in calls)
