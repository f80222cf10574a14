"""Retrieval: does the model's embedding of a query find the passages that answer it? By ir-measures (extra [retrieval]).

    evals={"nq": {"name": "ranking", "corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "test.jsonl"}}
    evals={"words": {"name": "ranking.bm25", "corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "test.jsonl"}}

The files have the fields of BEIR, a row a line:

    corpus   {"_id": "d1", "title": "Paris", "text": "Paris is the capital of ..."}       title may be absent
    queries  {"_id": "q1", "text": "the capital of France"}
    qrels    {"query-id": "q1", "corpus-id": "d1", "score": 1}        or BEIR's table with tabs between, *.tsv

Only queries that qrels names are asked. A passage with the id of its query is no result of it, as in BEIR. Figures carry the
names of ir-measures: nDCG@10 (with linear gains, over the ideal order of all judged passages), R@100 (recall), RR@10 (the
reciprocal rank, whose mean is MRR), AP (whose mean is MAP). Each is a mean over queries, with its 95% interval.
"""

import csv
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ir_measures
import numpy as np
from etils import epath

from jaxpost.data import readers
from jaxpost.data.nearest import nearest
from jaxpost.errors import UserError
from jaxpost.evals.intervals import Z, standard_error

MEASURES = ("nDCG@10", "R@10", "R@100", "RR@10", "AP")
DEPTH = 1000  # results of a query that are judged
EXACT = 1_000_000  # passages up to which search is exact


class Collection(NamedTuple):
    """Passages and queries by id, and the judged grade of a passage for a query: {query id: {passage id: grade}}."""

    passages: dict[str, str]
    queries: dict[str, str]
    grades: dict[str, dict[str, int]]


def ranking(
    model: Any,
    *,
    corpus: str,
    queries: str,
    qrels: str,
    measures: Sequence[str] = MEASURES,
    instruction: str = "",
    passage_instruction: str = "",
    pooling: str | None = None,
    normalise: bool = True,
    rows: int = 32,
    exact: int = EXACT,
) -> Iterator[tuple[str, Any]]:
    """(each measure, with NAME_low and NAME_high; queries; passages) by the embeddings of a model, the closest passages first.

    measures: names of ir-measures. instruction, passage_instruction, pooling, normalise, rows: as `Model.embed` takes them. In
    a stage that trains an objective of contrastive, pooling and normalise are the objective's unless they are given. Texts that
    are too long are cut. exact: passages up to which search is exact; above it is faiss's, which may miss some.
    Raises UserError for what is wrong with a file, and for an unknown measure.
    """
    collection = read(corpus, queries, qrels)
    options = {"pooling": pooling, "normalise": normalise, "rows": rows, "too_long": "truncate"}
    asked = model.embed(list(collection.queries.values()), instruction=instruction, **options)
    passages = model.embed(list(collection.passages.values()), instruction=passage_instruction, **options)
    k = min(DEPTH + 1, len(passages))  # one of them may be the query itself
    search = nearest if len(passages) <= exact else _approximate
    yield from _judged(collection, search(asked, passages, k)[1], measures)


def bm25(
    model: Any, *, corpus: str, queries: str, qrels: str, measures: Sequence[str] = MEASURES, language: str = "english"
) -> Iterator[tuple[str, Any]]:
    """The figures of `ranking` by BM25, from the words of query and passage; the model is not asked. By bm25s.

    language: whose stop words are left out; "" leaves none out. Raises what `ranking` raises.
    """
    bm25s = _package("bm25s")
    collection = read(corpus, queries, qrels)

    def words(texts):
        return bm25s.tokenize(list(texts.values()), stopwords=language or None, show_progress=False)

    index = bm25s.BM25()
    index.index(words(collection.passages), show_progress=False)
    k = min(DEPTH + 1, len(collection.passages))
    numbers, scores = index.retrieve(words(collection.queries), k=k, show_progress=False)
    # Of equal scores the passage of the lower number first, as in `nearest`.
    order = np.lexsort((numbers, -scores), axis=1)
    yield from _judged(collection, np.take_along_axis(numbers, order, axis=1), measures)


def read(corpus: str, queries: str, qrels: str) -> Collection:
    """The files of a collection. Raises UserError for a row without its fields, and for a judgement of what is not there."""
    passages, texts = _by_id(corpus), _by_id(queries)
    grades: dict[str, dict[str, int]] = {}
    for record in _judgements(qrels):
        query, passage, grade = (record.row.get(field) for field in ("query-id", "corpus-id", "score"))
        if query is None or passage is None or grade is None or not str(grade).lstrip("-").isdigit():
            raise UserError(f"{record.place}: {record.row}; a judgement has query-id, corpus-id and a whole number as score")
        if str(passage) not in passages:
            raise UserError(f"{record.place}: no passage {passage!r} in {corpus}; take the judgement out, or add the passage")
        grades.setdefault(str(query), {})[str(passage)] = int(grade)
    if lacking := grades.keys() - texts.keys():
        raise UserError(f"{qrels}: no query {min(lacking)!r} in {queries}; take its judgements out, or add the query")
    return Collection(passages, {name: text for name, text in texts.items() if name in grades}, grades)


def _judgements(path: str) -> list[readers.Record]:
    if not path.endswith(".tsv"):
        return readers.read(path)
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"qrels={path}: no such file.")
    rows = csv.DictReader(file.read_text().splitlines(), delimiter="\t")
    return [readers.Record(row, f"{file.name}, line {line}") for line, row in enumerate(rows, start=2)]


def _by_id(path: str) -> dict[str, str]:
    """{id: title and text} of a file's rows."""
    texts: dict[str, str] = {}
    for row, place in readers.read(path):
        name, text = row.get("_id"), row.get("text")
        if name is None or str(name) in texts:
            fault = "there is no _id" if name is None else f"an earlier row has the _id {name!r} too"
            raise UserError(f"{place}: {fault}; give each passage and each query one of its own")
        texts[str(name)] = f"{row.get('title') or ''} {text}".strip() if isinstance(text, str) else ""
        if not texts[str(name)]:
            raise UserError(f"{place}: text is {text!r}; write the text of the passage or query, or take the row out")
    return texts


def _judged(collection: Collection, numbers: np.ndarray, measures: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The figures of the passages with these numbers [Q,k], each query's best first, and a row for each query."""
    ids, asked, parsed = list(collection.passages), list(collection.queries), _parsed(measures)
    orders = [[ids[i] for i in row if i >= 0 and ids[i] != query][:DEPTH] for query, row in zip(asked, numbers, strict=True)]
    # Scores that fall with the rank: ties are settled already.
    run = {q: {name: float(-rank) for rank, name in enumerate(order)} for q, order in zip(asked, orders, strict=True)}
    each: dict[str, dict[str, float]] = {str(measure): {} for measure in parsed}
    for metric in ir_measures.iter_calc(parsed, collection.grades, run):
        each[str(metric.measure)][metric.query_id] = metric.value
    for name, scores in each.items():
        values = [scores[query] for query in asked]
        yield name, (mean := float(np.mean(values)))
        if len(values) > 1:
            error = standard_error(values)
            yield f"{name}_low", max(0.0, mean - Z * error)
            yield f"{name}_high", min(1.0, mean + Z * error)
    yield "queries", len(asked)
    yield "passages", len(ids)
    first = next(iter(each.values()))
    yield "samples", [_sample(i, q, orders[i], collection, first[q]) for i, q in enumerate(asked)]


def _sample(number: int, query: str, order: Sequence[str], collection: Collection, reward: float) -> dict:
    answers = [collection.passages[name] for name, grade in collection.grades[query].items() if grade > 0]
    best = collection.passages[order[0]] if order else ""
    return {
        "problem": number,
        "prompt": collection.queries[query],
        "completion": best,
        "answer": answers[0] if answers else "",
        "reward": reward,
    }


def _parsed(measures: Sequence[str]) -> list:
    try:
        return [ir_measures.parse_measure(name) for name in measures]
    except Exception as error:  # of its parser, of several kinds
        raise UserError(f"measures={list(measures)}: {error}; give names of ir-measures, as {', '.join(MEASURES)}.") from error


def _approximate(queries: np.ndarray, passages: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, numbers) [Q,k] by faiss: passages in about 4 sqrt(N) clusters, of which a sixteenth are searched."""
    faiss = _package("faiss")
    clusters = max(1, int(4 * len(passages) ** 0.5))
    index = faiss.index_factory(passages.shape[1], f"IVF{clusters},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(passages)
    index.add(passages)
    index.nprobe = max(1, clusters // 16)
    return index.search(queries, k)


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"evals.ranking needs {name}, which is not installed; pip install 'jaxpost[retrieval]'.") from error


def _check(package: str = "") -> Callable:
    def check(model, corpus: str, queries: str, qrels: str, measures: Sequence[str] = MEASURES, **_: Any) -> None:
        if package:
            _package(package)
        else:
            model.need_tokenizer()
        _parsed(measures)
        read(corpus, queries, qrels)

    return check


ranking.check, bm25.check = _check(), _check("bm25s")
