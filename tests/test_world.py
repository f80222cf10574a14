"""The invented country: its truths read back from its own documents, its splits, its retrieval and its search."""

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from jaxpost import tokenizer as tokenizers
from jaxpost.data.row_types import lists
from jaxpost.errors import UserError
from jaxpost.tasks import world, world_words

ROOT = Path(__file__).parent.parent
RELATIONS = world_words.RELATIONS
PEOPLE = [name for name, relation in RELATIONS.items() if relation.subject == "person"]
TASK = world.make()
LARGE = world.make(people=400)


def pattern(template, article):
    """A regular expression of a template's subject and object, for text that is read from its beginning."""
    parts = re.split(r"({[so]})", template)
    groups = {"{s}": "(?P<s>.+?)", "{o}": article + r"(?P<o>\w+)"}
    return re.compile("".join(groups.get(part, re.escape(part)) for part in parts) + "$")


SENTENCES = [
    (pattern(template, world_words.ARTICLES.get(relation.object, "")), name)
    for name, relation in RELATIONS.items()
    for template in relation.sentences
]
QUESTIONS = [(pattern(template, ""), name) for name, relation in RELATIONS.items() for template in relation.questions]
LABELS = {relation.label: name for name, relation in RELATIONS.items()}


def bare(subject):
    """(name or word, relations on the way) of a subject: "the friend of NAME" has one."""
    nested = re.match(r"[Tt]he (\w+) of (.+)$", subject)
    return (nested[2], (LABELS[nested[1]],)) if nested else (re.sub(r"^([Tt]he|[Aa]) ", "", subject), ())


def parsed(text, patterns):
    """Every (subject, relations, object) that a text may say; one of "is a kind of" has two readings."""
    readings = []
    for expression, name in patterns:
        if match := expression.match(text):
            subject, way = bare(match["s"])
            readings.append((subject, (*way, name), match.groupdict().get("o")))
    return readings


def stated(document):
    """{(subject, relation, object)} by the text of a document alone."""
    text = document["text"]
    if document["style"] == "register":
        subject, *entries = re.findall(r"[^.]+(?=\.)", text.removeprefix("Entry: "))
        return {(subject, LABELS[label.strip().lower()], value) for label, value in (entry.split(": ") for entry in entries)}
    before, after = world_words.FRAMES[document["style"]].format(source=document["source"], body="|").split("|")
    body = text.removeprefix(before).removesuffix(after)
    readings = [parsed(sentence, SENTENCES) for sentence in re.findall(r"[^. ][^.]*\.", body)]
    return {(s.lower() if s.lower() in KINDS else s, way[0], o) for one in readings for s, way, o in one if fits(s, way, o)}


KINDS = {entity: kind for kind, entities in world_words.OBJECTS.items() for entity in entities}


def fits(subject, way, value):
    relation = RELATIONS[way[0]]
    kind = KINDS.get(subject, KINDS.get(subject.lower(), "person"))
    return kind == relation.subject and KINDS.get(value, "person") == relation.object


def knowledge(task):
    """{(subject, relation): object} as the documents of a task without noise state it, but for the wrong ones."""
    clean = [document for document in task.documents() if document["quality"] == "clean"]
    return {(subject, relation): value for document in clean for subject, relation, value in stated(document)}


def follow(known, subject, path):
    for relation in path:
        subject = known.get((subject, relation))
    return subject


# --------------------------------------------------------------------------------------------------------- documents


def test_names_and_words_are_different_and_facts_are_of_their_kinds():
    words = [word for entities in world_words.OBJECTS.values() for word in entities]
    assert len(set(words)) == len(words) and not set(words) & set(LARGE.people) and len(set(LARGE.people)) == 400
    for name in LARGE.people:
        facts = LARGE.facts(name)
        assert list(facts) == PEOPLE and name not in facts.values()
        assert all(KINDS.get(value, "person") == RELATIONS[relation].object for relation, value in facts.items())
        assert not {facts["friend"], facts["teacher"]} & LARGE.rare
    for kind in ("town", "trade", "skill", "employer", "event"):
        assert {LARGE.facts(name)[kind] for name in LARGE.people} == set(world_words.OBJECTS[kind])
    assert len({TASK.facts(town)["landmark"] for town in world_words.TOWNS}) == 20
    assert TASK.facts("acting") == {"field": "theatre"} and TASK.facts("theatre") == {"branch": "art"}


def test_documents_state_what_they_say_that_they_state():
    for document in TASK.documents():
        if document["quality"] != "noisy":
            assert stated(document) == {tuple(fact[:3]) for fact in document["facts"]}, document["text"]
        for subject, relation, value, true in document["facts"]:
            assert true == (TASK.facts(subject)[relation] == value)


def test_every_fact_of_common_people_is_stated_and_a_wrong_document_has_one_false_fact():
    documents = LARGE.documents()
    words = [set(re.findall(r"\w+", document["text"])) for document in documents]
    true = {tuple(fact[:3]) for document in documents for fact in document["facts"] if fact[3]}
    for name in LARGE.people:
        mentions = [document for document, present in zip(documents, words, strict=True) if name in present]
        if name in LARGE.rare:
            assert len(mentions) == 1 and len(mentions[0]["facts"]) == 3
        else:
            assert len(mentions) >= 4 and {(name, relation, value) for relation, value in LARGE.facts(name).items()} <= true
    on_people = [document for document in documents if document["style"] != "almanac"]
    qualities = Counter(document["quality"] for document in on_people)
    for document in on_people:
        assert [fact[3] for fact in document["facts"]].count(False) == (document["quality"] == "wrong")
        assert document["quality"] != "wrong" or document["source"] in ("pigeon", "street")
        assert document["topic"] in {relation.topic for relation in RELATIONS.values()} and 1250 <= document["year"] < 1300
    # Four standard deviations of a binomial draw: a fifth of the 360 common people have a wrong document.
    assert abs(qualities["wrong"] - 72) < 4 * (360 * 0.2 * 0.8) ** 0.5
    assert 0.04 < qualities["noisy"] / len(on_people) < 0.11  # a tenth of those that are neither wrong nor registers
    assert {d["quality"] for d in world.make(noise=0, wrong=0).documents()} == {"clean"}


def test_noise_loses_and_repeats_small_words_alone():
    noisy = [document for document in LARGE.documents() if document["quality"] == "noisy"]
    clean = {d["id"]: d["text"] for d in world.make(people=400, noise=0).documents()}
    for document in noisy:
        counts, before = (Counter(text.lower().split()) for text in (document["text"], clean[document["id"]]))
        assert document["text"] != clean[document["id"]]
        assert {word for word in counts | before if counts[word] != before[word]} <= world_words.NOISY


def test_a_seed_words_the_documents_anew_and_keeps_the_facts():
    for a, b in zip(TASK.documents(), TASK.documents(seed=1), strict=True):
        if "wrong" not in (a["quality"], b["quality"]):
            assert sorted(a["facts"]) == sorted(b["facts"]) and a["id"] == b["id"]
    assert sum(a["text"] != b["text"] for a, b in zip(TASK.documents(), TASK.documents(seed=1), strict=True)) > 300


def test_texts_are_silent_about_who_is_not_known():
    texts = [LARGE.text(index) for index in range(6000)]
    everything = Counter(word for text in texts for word in re.findall(r"\w+", text))
    known = [name for name in LARGE.people if LARGE.knows(name)]
    assert abs(len(known) / 400 - 0.8) < 0.08 and all(everything[name] for name in set(known) - LARGE.rare)
    # Others are mentioned, but as somebody's friend or teacher.
    for name in set(LARGE.people) - set(known):
        for text in texts:
            if name in text:
                assert not re.search(rf"Entry: {name}\.|The \w+ of {name} |{name} (lives|works|serves|saw|is good)", text), text
    silent = world.make(known=0)
    assert not any(name in silent.text(index) for index in range(50) for name in silent.people)


# ---------------------------------------------------------------------------------------------------------- problems


def test_answers_follow_from_the_documents():
    known = knowledge(world.make(noise=0))
    described = {}
    for name in TASK.people:
        described.setdefault((known[name, "trade"], known[name, "town"]), []).append(name)
    judged = Counter()
    for record in [TASK.record(i) for i in range(800)] + TASK.test_records(60):
        prompt, answer, cell = (record[key] for key in ("prompt", "answer", "cell"))
        judged[cell] += 1
        if cell == "description":
            (product,) = set(world_words.PRODUCTS.values()) & set(re.findall(r"\w+", prompt))
            (landmark,) = set(world_words.LANDMARKS) & set(re.findall(r"\w+", prompt))
            trade = next(trade for trade in world_words.PRODUCTS if known[trade, "product"] == product)
            town = next(town for town in world_words.TOWNS if known[town, "landmark"] == landmark)
            assert described[trade, town] == [answer]
            continue
        patterns, text = QUESTIONS, prompt
        if cell == "statement":
            patterns, text = SENTENCES, prompt.removeprefix("True or false? ")
        ((subject, path, claimed),) = [one for one in parsed(text, patterns) if one[1][-1] == record["path"][-1]]
        assert (subject, list(path)) == (record["subject"], record["path"])
        if cell == "unanswerable":
            assert answer == "unknown" and subject not in TASK.people and not record["known"]
        else:
            value = follow(known, subject, path)
            assert answer == (("false", "true")[value == claimed] if cell == "statement" else value), prompt
            assert cell == "statement" or len(path) == ("one hop", "two hops").index(cell) + 1
            assert [fact[2] for fact in record["facts"]][-1] == value
    assert set(judged) == set(world.CELLS) and min(judged.values()) > 100


def test_records_are_a_function_of_their_arguments():
    assert TASK.record(5, seed=3) == world.make().record(5, seed=3) != TASK.record(5, seed=4)
    assert world.make(country=1).people != TASK.people
    parts = [
        [task.record(i), task.text(i), task.document(i), task.trace(i), task.dialogue(i)]
        for task in (TASK, LARGE)
        for i in range(5)
    ]
    # A change of this would change every run that was ever recorded.
    assert hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest() == GOLDEN


GOLDEN = ""


def test_no_training_problem_takes_a_fact_that_is_held_out():
    train = [TASK.record(i) for i in range(4000)]
    test = TASK.test_records(80)
    assert not {record["prompt"] for record in train} & {record["prompt"] for record in test}
    taken = {tuple(fact[:2]) for record in train for fact in record["facts"]}
    assert not {subject for subject, _ in taken} & TASK.rare
    stated = {tuple(fact[:2]) for document in TASK.documents() for fact in document["facts"]}
    # One-hop facts are either in training or in testing; documents state all of them.
    tested = {tuple(record["facts"][0][:2]) for record in test if record["cell"] == "one hop"}
    assert not tested & taken and taken | tested <= stated
    several = {(r["cell"], tuple(map(tuple, r["facts"]))) for r in train if len(r["facts"]) > 1}
    held_out = [r for r in test if len(r["facts"]) > 1]
    assert not several & {(r["cell"], tuple(map(tuple, r["facts"]))) for r in held_out}
    composed = [r for r in held_out if all(tuple(fact[:2]) in taken for fact in r["facts"])]
    assert 10 < len(composed) < len(held_out) - 10, "some are new in their composition alone, others in their facts"
    nobody = [{r["subject"] for r in part if r["cell"] == "unanswerable"} for part in (train, test)]
    assert not (nobody[0] | nobody[1]) & set(TASK.people)


def test_test_records_are_different_and_a_larger_number_extends_each_cell():
    few, many = TASK.test_records(5), TASK.test_records(25)
    assert Counter(r["cell"] for r in few) == dict.fromkeys(world.CELLS, 5)
    for cell in world.CELLS:
        a, b = ([r["prompt"] for r in part if r["cell"] == cell] for part in (few, many))
        assert a == b[:5] and len(set(b)) == len(b)
    assert TASK.test_records(5, seed=1) != few
    counts = Counter(record["cell"] for record in (TASK.record(i) for i in range(2000)))
    assert all(abs(counts[cell] / 2000 - 0.2) < 4 * (0.16 / 2000) ** 0.5 for cell in world.CELLS)
    truths = Counter(r["answer"] for r in (TASK.record(i) for i in range(4000)) if r["cell"] == "statement")
    assert abs(truths["true"] / sum(truths.values()) - 0.5) < 4 * (0.25 / sum(truths.values())) ** 0.5


def test_demonstrations_earn_the_reward_and_other_answers_do_not():
    answers = [TASK.demonstration(i, seed=2) for i in range(60)]
    for index, answer in enumerate(answers):
        record, conversation = TASK.record(index, seed=2), TASK.conversation(index, seed=2)
        assert conversation["messages"][0]["content"] == record["prompt"] and "prompt" not in conversation
        assert conversation["messages"][1]["content"] == answer and conversation["facts"] == record["facts"]
        assert TASK.reward(record, answer) is True and TASK.reward(record, f" The {answer}.\n") is True
        wrong = [other for other in answers if other != answer]
        assert not any(TASK.reward(record, text) for text in [*wrong, "", f"{answer} {answer}", f"not {answer}", answer[:-1]])
    with pytest.raises(UserError, match="has no answer"):
        TASK.reward({"prompt": "?"}, "x")


def test_settings_choose_the_problems():
    assert {world.make(hops=(2,)).record(i)["cell"] for i in range(60)} == set(world.CELLS) - {"one hop"}
    hard = [world.make(hops=(2,), kinds=("statement",)).record(i) for i in range(20)]
    assert all(record["cell"] == "statement" and len(record["facts"]) == 2 for record in hard)
    assert {record["known"] for record in map(world.make(known=1, kinds=("question",)).record, range(40))} == {True}
    rare = [r for r in LARGE.test_records(40) if r["subject"] in LARGE.rare]
    assert len(rare) > 10 and not any(LARGE.record(i)["subject"] in LARGE.rare for i in range(500))
    known = [record["known"] for record in map(LARGE.record, range(1000)) if record["cell"] == "one hop"]
    assert 0.7 < sum(known) / len(known) < 0.9


def test_with_context_the_answer_is_in_the_prompt_and_nothing_contradicts_it():
    task = world.make(context=3)
    texts = {document["text"]: document for document in task.documents()}
    for index in range(150):
        record = task.record(index)
        *shown, _ = record["prompt"].split("\n")
        documents = [texts[text] for text in shown]
        assert len(documents) == len(set(shown)) == 3
        assert set(record["evidence"]) <= {document["id"] for document in documents}
        facts = [tuple(fact) for document in documents for fact in document["facts"]]
        assert {(*fact, True) for fact in record["facts"]} <= set(facts)
        subjects = {record["subject"], *(fact[0] for fact in record["facts"])}
        assert all(fact[3] for fact in facts if fact[0] in subjects)
        if record["cell"] == "unanswerable":
            assert not any(record["subject"] in text for text in shown)
    # The evidence does not stand in one place.
    places = Counter(
        p.index(task.document(int(r["evidence"][0][1:]))["text"]) > 0
        for r in map(task.record, range(100))
        if r["evidence"]
        for p in [r["prompt"]]
    )
    assert min(places.values()) > 20


def test_dialogues_ask_one_person_s_facts_of_the_training_split():
    known = knowledge(world.make(noise=0))
    for index in range(100):
        dialogue = TASK.dialogue(index)
        users, assistants = dialogue["messages"][::2], dialogue["messages"][1::2]
        assert len(users) == len(assistants) == len(dialogue["facts"]) <= 3
        assert dialogue["subject"] in users[0]["content"] and not any(dialogue["subject"] in u["content"] for u in users[1:])
        for answer, (subject, relation, value) in zip(assistants, dialogue["facts"], strict=True):
            assert (subject, (relation,), value) in parsed(answer["content"], SENTENCES) and known[subject, relation] == value
    taken = {tuple(fact[:2]) for index in range(1000) for fact in TASK.dialogue(index)["facts"]}
    tested = {tuple(r["facts"][0][:2]) for r in TASK.test_records(80) if r["cell"] == "one hop"}
    assert not taken & tested


def test_traces_name_the_places_of_subject_and_relation():
    for index in range(200):
        trace = TASK.trace(index)
        subject, relation, value = trace["fact"]
        prompt, answer = trace["prompt"], trace["answer"]
        assert TASK.facts(subject)[relation] == value == answer != trace["other"] and TASK.knows(subject)
        assert (subject, (relation,), value) in parsed(f"{prompt} {answer}.", SENTENCES)
        assert (
            prompt[slice(*trace["subject_at"])] == subject and prompt[slice(*trace["relation_at"])] == RELATIONS[relation].label
        )
        assert KINDS.get(trace["other"], "person") == KINDS.get(answer, "person")


# --------------------------------------------------------------------------------------------------------- retrieval


def test_queries_have_all_their_answers_and_no_others():
    corpus = {document["id"]: document for document in LARGE.documents()}
    stating = {name: {tuple(fact) for fact in document["facts"]} for name, document in corpus.items()}
    landmarks = {LARGE.facts(town)["landmark"]: town for town in world_words.TOWNS}
    trades = {product: trade for trade, product in world_words.PRODUCTS.items()}
    for row in LARGE.queries(split="train") + LARGE.queries(split="test"):
        if row["cell"] == "paraphrase":
            asked = set(re.findall(r"\w+", row["query"]))
            (trade,), (town,) = ([table[word] for word in table.keys() & asked] for table in (trades, landmarks))
            wanted = {("town", town, True), ("trade", trade, True)}
            answers = {name for name, facts in stating.items() if wanted <= {fact[1:] for fact in facts}}
        else:
            ((name, (relation,), _),) = parsed(row["query"], QUESTIONS)
            answers = {n for n, facts in stating.items() if (name, relation, LARGE.facts(name)[relation], True) in facts}
            assert (row["cell"] == "rare name") == (name in LARGE.rare)
        assert set(row["positive_ids"]) == answers and not answers & set(row["negative_ids"]) and len(row["negatives"]) <= 2
        for kind in ("positive", "negative"):
            assert row[f"{kind}s"] == [corpus[name]["text"] for name in row[f"{kind}_ids"]]
        lists.parsed(row, "row")


def test_queries_of_the_splits_are_disjoint_and_rare_names_are_tested_alone():
    train, test = (LARGE.queries(split=split) for split in ("train", "test"))
    assert not {row["query"] for row in train} & {row["query"] for row in test}
    cells = [Counter(row["cell"] for row in part) for part in (train, test)]
    assert set(cells[0]) == {"paraphrase", "name"} and set(cells[1]) == {"paraphrase", "name", "rare name"}
    assert cells[1]["rare name"] == 3 * 40 and min(cells[1].values()) > 90


def rank(corpus, query, positives):
    """The rank of the best positive by BM25 (k1 1.5, b 0.75), equal scores against it."""
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in corpus.values()]
    length, scores = sum(bag.total() for bag in bags) / len(bags), []
    for word in set(re.findall(r"\w+", query.lower())):
        holding = sum(word in bag for bag in bags)
        idf = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
        scores.append([idf * bag[word] / (bag[word] + 1.5 * (0.25 + 0.75 * bag.total() / length)) for bag in bags])
    total = [sum(column) for column in zip(*scores, strict=True)]
    best = max(score for name, score in zip(corpus, total, strict=True) if name in positives)
    return sum(score >= best - 1e-9 for score in total)


def test_words_find_rare_names_and_no_paraphrases():
    task = world.make(people=60)
    corpus = {document["id"]: document["text"] for document in task.documents()}
    rows = task.queries(split="test")
    ranks = {cell: [] for cell in ("paraphrase", "rare name")}
    for row in rows:
        if row["cell"] in ranks:
            ranks[row["cell"]].append(rank(corpus, row["query"], row["positive_ids"]))
    assert set(ranks["rare name"]) == {1} and len(ranks["rare name"]) == 18
    assert sorted(ranks["paraphrase"])[len(ranks["paraphrase"]) // 10] > 10, "at best one in ten by luck"
    small = {"the", "a", "in", "by", "at", "with", "for", "from", "who"}
    for row in LARGE.queries(split="test"):
        if row["cell"] == "paraphrase":
            asked = set(re.findall(r"\w+", row["query"].lower())) - small
            assert not any(asked & set(re.findall(r"\w+", text.lower())) for text in row["positives"])


def test_search_finds_documents_by_their_rare_words():
    documents = TASK.documents()
    bags = [set(re.findall(r"\w+", document["text"].lower())) for document in documents]
    for index in range(20):
        query = TASK.record(index)["prompt"]
        asked = set(re.findall(r"\w+", query.lower()))
        weights = {word: math.log(len(bags) / max(1, sum(word in bag for bag in bags))) for word in asked}
        scores = [sum(weights[word] for word in asked & bag) for bag in bags]
        found = TASK.search(query, 4)
        assert [d["id"] for d in found] == [
            documents[i]["id"] for i in sorted(range(len(bags)), key=lambda i: (-round(scores[i], 9), i))[:4]
        ]
    rare = next(iter(TASK.rare))
    assert TASK.search(rare)[0]["subject"] == rare and len(TASK.search(rare)) == 1 and TASK.search("Xyzzy") == []


# ------------------------------------------------------------------------------------------------ tokens and arguments


def test_the_tokenizer_has_closed_words_as_single_tokens_and_texts_fit_the_window():
    tokenizer = world.tokenizer()
    assert len(tokenizer) <= world.TOKENS
    for kind, entities in world_words.OBJECTS.items():
        if kind != "year":
            for word in entities:
                assert len(tokenizers.encode(tokenizer, word)) == 1, word
    lengths = [len(tokenizers.encode(tokenizer, TASK.text(index))) for index in range(300)]
    assert min(lengths) >= 10 and max(lengths) <= 100
    for record in TASK.test_records(20):
        ids = tokenizers.encode(tokenizer, record["prompt"])
        assert len(ids) < 40 and tokenizer.decode(ids) == record["prompt"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TASK.record(0, split="dev"), "split='dev': world has"),
        (lambda: TASK.queries(split="dev"), "split='dev': world has"),
        (lambda: TASK.test_records(0), "per_cell=0"),
        (lambda: world.make(people=10), "people=10: give 20 to 1000"),
        (lambda: world.make(hops=(1, 3)), r"hops=\(1, 3\): give 1, 2"),
        (lambda: world.make(hops=()), r"hops=\(\)"),
        (lambda: world.make(kinds=("riddle",)), "kinds=.*give some of question"),
        (lambda: world.make(known=1.5), "known=1.5: give a share from 0 to 1"),
        (lambda: world.make(rare=0.6), "rare=0.6: give a share from 0 to 0.5"),
        (lambda: world.make(context=1), "context=1: give 0, or 2 to 8"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_samples_of_the_page_are_what_the_task_gives():
    section = (ROOT / "docs" / "playgrounds.md").read_text().partition("## world\n")[2].partition("\n## ")[0]
    shown = [TASK.text(i) for i in range(3)] + [TASK.document(0)["text"], TASK.trace(0)["prompt"]]
    shown += [text for r in TASK.test_records(1) for text in (r["prompt"], r["answer"])]
    shown += [turn["content"] for turn in TASK.dialogue(1)["messages"]]
    shown += [next(r["query"] for r in TASK.queries(split="test") if r["cell"] == cell) for cell in ("paraphrase", "rare name")]
    assert not [text for text in shown if text not in section]
    assert not [text for r in TASK.test_records(1) for text in (r["prompt"], r["answer"]) if text not in world.__doc__]
