"""Constraints: a trie lets only its sequences through, and an FM-index only what occurs in its corpus.

Both are held against a plain search through the texts, over all that a completion may be so far, and through the whole sampler.
"""

import dataclasses
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_cases as cases
import thin
from sampler_cases import COUNT, GROUP, NEW, STOP, sampled
from toy_tokenizers import characters

import jaxpost
from jaxpost.errors import UserError
from jaxpost.evals.accuracy import accuracy
from jaxpost.sampling import constrained, processors, slots
from jaxpost.tasks import arithmetic

VOCAB = 17


def titles(seed: int = 0, count: int = 40) -> list[list[int]]:
    """Sequences of 1 to 6 ids, some of them the beginning of another."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(4, VOCAB, rng.integers(2, 7)).tolist() for _ in range(count)]
    return drawn + [ids[:2] for ids in drawn[:5]] + [drawn[0]]


def chained(name: str, texts, stop=(STOP,), new: int = NEW, tokenizer=None):
    about = processors.About(tokenizer, tuple(stop), VOCAB, new)
    return processors.chain([{"name": f"constrained.{name}", "texts": texts}], about, "processors")


@jax.jit
def _processed(processor, logits, context):
    return processor(logits, context)


def columns(rows: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [R,N], counts [R]) of completions."""
    tokens, counts = np.zeros((len(rows), max(map(len, rows)) + 1), np.int32), np.array([len(row) for row in rows], np.int32)
    for own, row in zip(tokens, rows, strict=True):
        own[: len(row)] = row
    return tokens, counts


def allowed(processor, rows: list[tuple], vocab: int) -> list[set[int]]:
    """What may follow each of these completions."""
    tokens, counts = columns(rows)
    out = _processed(processor, jnp.zeros((len(rows), vocab)), {"tokens": tokens, "counts": counts})
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(out)]


# ----------------------------------------------------------------------------------------------------------------- Trie


@pytest.mark.parametrize("sequences", [titles(), [[5]], [[4, 4, 4], [4], [16, 4]], [[i] for i in range(4, 17)]], ids=len)
def test_after_each_beginning_a_trie_allows_what_its_sequences_have_there(sequences):
    (trie,) = chained("trie", sequences)
    beginnings = sorted({tuple(ids[:n]) for ids in sequences for n in range(len(ids) + 1)})
    following = [{ids[len(b)] for ids in sequences if len(ids) > len(b) and tuple(ids[: len(b)]) == b} for b in beginnings]
    wanted = [ids | ({STOP} if list(b) in sequences else set()) for b, ids in zip(beginnings, following, strict=True)]
    assert allowed(trie, beginnings, VOCAB) == wanted
    beyond = [b + (x,) for b in beginnings for x in range(VOCAB) if b + (x,) not in beginnings]
    assert allowed(trie, beyond, VOCAB) == [{STOP}] * len(beyond)
    assert constrained.trie.admits(*columns(beginnings), **trie.arrays).all()
    over = [b in map(tuple, sequences) and x == STOP for *b, x in beyond for b in [tuple(b)]]  # whole ones, with their end
    assert constrained.trie.admits(*columns(beyond), **trie.arrays).tolist() == over and any(over)


def restricted_logps(drawn, sequences, temperature: float, chosen=None) -> np.ndarray:
    """The log-probabilities of the drawn tokens by the training forward, over what a plain search allows."""
    scores = cases.judged(drawn, chosen=chosen)
    for row, own in zip(scores, drawn.tokens, strict=True):
        for n, logits in enumerate(row):
            beginning = own[:n].tolist()
            following = {ids[n] for ids in sequences if len(ids) > n and ids[:n] == beginning}
            following |= {STOP} if beginning in sequences else set()
            logits[[i for i in range(VOCAB) if i not in following]] = -np.inf
    with np.errstate(invalid="ignore"):
        return cases.logps(scores, drawn, temperature)


@pytest.mark.parametrize(
    "changes",
    thin.slow_after(2, [{"slots": 2}, {"temperature": 0.0}, {}, {"sizes": (2, 2, 2)}, {"slots": 2, "top_k": 2}]),
    ids=["refilled", "greedy", "groups", "devices", "top_k"],
)
def test_every_completion_is_one_of_the_titles(changes):
    options = {"temperature": 3.0, **changes}
    sequences = titles()
    drawn = sampled(chain=chained("trie", sequences), **options)
    completions = [row[:n].tolist() for row, n in zip(drawn.tokens, drawn.lengths, strict=True)]
    assert all(ids[-1] == STOP and ids[:-1] in sequences for ids in completions) and drawn.stopped.all()
    if options["temperature"] and not options.get("top_k"):
        assert len({tuple(ids) for ids in completions}) > 8
        inside = np.arange(NEW) < drawn.lengths[:, None]
        np.testing.assert_allclose(drawn.logps[inside], restricted_logps(drawn, sequences, 3.0)[inside], atol=5e-5)


def test_given_tokens_are_gone_on_from_and_others_refused():
    rng, sequences = np.random.default_rng(1), titles()
    begun = [sequences[i][: rng.integers(0, 3)] for i in rng.integers(0, len(sequences), COUNT * GROUP)]
    given = [np.array(ids, np.int32) for ids in begun]
    drawn = sampled(chain=chained("trie", sequences), slots=2, temperature=3.0, given=given)
    over = sampled(
        chain=chained("trie", sequences), slots=2, temperature=3.0, given=[np.array([*sequences[0], STOP])] * COUNT * GROUP
    )
    assert {tuple(row[:n]) for row, n in zip(over.tokens.tolist(), over.lengths, strict=True)} == {(*sequences[0], STOP)}
    for row, n, ids in zip(drawn.tokens, drawn.lengths, begun, strict=True):
        assert row[: len(ids)].tolist() == ids and row[: n - 1].tolist() in sequences and row[n - 1] == STOP
    given[7] = np.array([4, 4, 4, 4], np.int32)
    for name in ("trie", "substring"):
        with pytest.raises(UserError, match=f"given: the 4 tokens that completion 7 begins with are not what {name} allows"):
            sampled(chain=chained(name, [ids for ids in sequences if ids != [4, 4, 4, 4]]), given=given)


def test_another_table_of_about_the_size_compiles_nothing():
    chains = [chained(name, titles(seed)) for name in ("trie", "substring") for seed in (0, 7)]
    sampled(chain=chains[0], slots=2), sampled(chain=chains[2], slots=2)
    before = slots.segment._cache_size()
    sampled(chain=chains[1], slots=2), sampled(chain=chains[3], slots=2)
    assert slots.segment._cache_size() == before


def test_an_eval_keeps_to_the_texts():
    fields = {"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    loaded = jaxpost.load(fields | {"num_attention_heads": 2, "max_position_embeddings": 32}, mesh=cases.mesh(1, 1, 1))
    model, texts = dataclasses.replace(loaded, tokenizer=arithmetic.tokenizer()), ["46", "4", "123"]
    trie = {"name": "constrained.trie", "texts": texts}
    figures = dict(accuracy(model, task="arithmetic", per_cell=3, new=6, processors=[trie]))
    assert {row["completion"] for row in figures["samples"]} == set(texts)
    with pytest.raises(UserError, match="'123' takes 4 tokens with its end, and a completion may have 3"):
        accuracy.check(model, task="arithmetic", new=3, processors=[trie])


# ------------------------------------------------------------------------------------------------------------- FM-index


def occurrences(documents, row: tuple) -> int:
    return sum(tuple(ids[i : i + len(row)]) == row for ids in documents for i in range(len(ids) - len(row) + 1))


@pytest.mark.parametrize("vocab, seed", [(5, 0), (5, 1), (9, 2), (300, 3), (70_000, 4)])
def test_an_index_counts_and_allows_what_a_plain_search_does(vocab, seed):
    rng = np.random.default_rng(seed)
    kinds = np.array([1, vocab - 1, *rng.integers(1, vocab, 3)])  # few, so that they repeat
    documents = [rng.choice(kinds, rng.integers(1, 60)).tolist() for _ in range(6)] + [[int(kinds[0])]]
    (processor,) = processors.chain(
        [{"name": "constrained.substring", "texts": documents}], processors.About(None, (0,), vocab, 8), "p"
    )
    rows = [(), *itertools.product(sorted(set(kinds.tolist())), repeat=2), (2, 3), (vocab - 2,)]
    rows += [tuple(ids[i : i + n]) for ids in documents for i, n in zip(rng.integers(0, 30, 5), (1, 3, 4, 5, 6), strict=True)]
    rows = sorted(set(rows))
    low, high = jax.jit(constrained._searched)(processor.arrays["index"], *columns(rows))
    size = sum(len(ids) + 1 for ids in documents)
    assert (high - low).tolist() == [occurrences(documents, row) if row else size for row in rows]
    wanted = [
        {x for x in set(kinds.tolist()) if occurrences(documents, (*row, int(x)))} | ({0} if row else set()) for row in rows
    ]
    assert allowed(processor, rows, vocab) == wanted
    over = [*[(*row, 0) for row in rows if row], (0,)]
    admitted = [occurrences(documents, row[:-1]) > 0 and len(row) > 1 for row in over]
    assert constrained.substring.admits(*columns(over), **processor.arrays).tolist() == admitted


@pytest.mark.parametrize(
    "changes", [{"slots": 2}, pytest.param({"sizes": (2, 2, 2)}, marks=pytest.mark.slow)], ids=["refilled", "devices"]
)
def test_every_completion_occurs_in_the_corpus(changes):
    documents = titles(count=12)
    drawn = sampled(chain=chained("substring", documents), temperature=3.0, **changes)
    for row, n in zip(drawn.tokens, drawn.lengths, strict=True):
        ids = tuple(row[: n - (row[n - 1] == STOP)].tolist())
        assert ids and occurrences(documents, ids)
    assert len({tuple(row) for row in drawn.tokens.tolist()}) > 8


# ---------------------------------------------------------------------------------------------------------- What is refused


def test_texts_that_cannot_be_completions_are_refused_by_name(tmp_path, monkeypatch):
    text = characters()
    for texts, message in (
        ([], "has no texts"),
        ([[4], []], "text 2 is empty"),
        ([[4, STOP]], "text 1 has the token 3, which ends a completion"),
        ([[4, VOCAB]], "text 1: has id 17, and the model has a vocabulary of 17"),
        (["four"], "text 1 is no list of ids, and the model has no tokenizer"),
        ("titles.txt", "no file titles.txt"),
        ([[4] * NEW], "takes 11 tokens with its end, and a completion may have 10"),
    ):
        with pytest.raises(UserError, match=message):
            chained("trie", texts)
    with pytest.raises(UserError, match="nothing ends a completion"):
        chained("trie", [[4]], stop=())
    (tmp_path / "titles.txt").write_text("ab\n\ncd\n")
    about = processors.About(text, (1,), 99, 8)
    (trie,) = processors.chain({"name": "constrained.trie", "texts": str(tmp_path / "titles.txt")}, about, "p")
    ids = [text(word, add_special_tokens=False)["input_ids"] for word in ("ab", "cd")]
    assert allowed(trie, [(), tuple(ids[0])], 99) == [{ids[0][0], ids[1][0]}, {1}]
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(UserError, match=r"needs pydivsufsort; pip install 'jaxpost\[constraints\]'"):
        chained("substring", [[4]])
