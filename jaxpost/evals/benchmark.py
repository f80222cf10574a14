"""MTEB's retrieval and reranking tasks, run by mteb-core (extra [retrieval]), which needs no torch for these.

    evals={"facts": {"name": "benchmark.mteb", "tasks": ["SciFact", "NFCorpus"], "instruction": "query: "}}

MTEB downloads a task's data, has the model index and search it, and judges the results. Its other kinds of tasks encode through
torch's data loaders.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mteb import get_task
from mteb.models.model_meta import ModelMeta

from jaxpost.data.nearest import nearest
from jaxpost.errors import UserError

KINDS = ("Retrieval", "Reranking")
FIGURES = ("ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10", "map_at_100")


class Search:
    """What jaxpost.load gives, as MTEB's SearchProtocol. options: as `Model.embed` takes them."""

    def __init__(self, model: Any, instruction: str = "", passage_instruction: str = "", **options):
        self.model, self.instruction, self.passage_instruction = model, instruction, passage_instruction
        self.options = {**options, "too_long": "truncate"}
        self.mteb_model_meta = ModelMeta.create_empty({"name": "jaxpost/model"})

    def index(self, corpus: Sequence[Mapping], **_) -> None:
        """Embeds the passages, {"id", "text", maybe "title"}."""
        texts = [f"{row.get('title') or ''} {row['text']}".strip() for row in corpus]
        self.ids = [row["id"] for row in corpus]
        self.passages = self.model.embed(texts, instruction=self.passage_instruction, **self.options)

    def search(
        self, queries: Sequence[Mapping], *, top_k: int, top_ranked: Mapping[str, Sequence[str]] | None = None, **_
    ) -> dict[str, dict[str, float]]:
        """{query id: {passage id: score}} of the best passages for each query; of those in `top_ranked` alone, if given."""
        names = [row["id"] for row in queries]
        vectors = self.model.embed([row["text"] for row in queries], instruction=self.instruction, **self.options)
        if top_ranked is not None:
            places = {name: i for i, name in enumerate(self.ids)}
            chosen = [np.array([places[passage] for passage in top_ranked[name]], int) for name in names]
            scores = [self.passages[some] @ vector for some, vector in zip(chosen, vectors, strict=True)]
        else:
            scores, chosen = nearest(vectors, self.passages, min(top_k, len(self.ids)))
        each = zip(names, chosen, scores, strict=True)
        return {name: {self.ids[i]: float(x) for i, x in zip(some, values, strict=True)} for name, some, values in each}


def mteb(
    model: Any,
    *,
    tasks: Sequence[str],
    instruction: str = "",
    passage_instruction: str = "",
    pooling: str | None = None,
    normalise: bool = True,
    rows: int = 32,
) -> Iterator[tuple[str, float]]:
    """(TASK/SPLIT/figure, value) of MTEB's tasks, by name; of a task with several subsets (TASK/SPLIT/SUBSET/figure, value).

    The other keywords: as `ranking.ranking` takes them. Raises UserError for an unknown task, and for one of another kind.
    """
    options = {"pooling": pooling, "normalise": normalise, "rows": rows}
    for name in tasks:
        task, search = _task(name), Search(model, instruction, passage_instruction, **options)
        task.load_data()
        for split in task.metadata.eval_splits:
            subsets = task.evaluate(search, split, encode_kwargs={"batch_size": rows})
            for subset, scores in subsets.items():
                prefix = "/".join([name, split, *[subset] * (len(subsets) > 1)])
                yield from ((f"{prefix}/{figure}", float(scores[figure])) for figure in FIGURES)


def _task(name: str):
    try:
        task = get_task(name)
    except KeyError as error:
        raise UserError(f"tasks: {error.args[0]}") from error
    if task.metadata.type not in KINDS:
        raise UserError(
            f"tasks: {name} is of the kind {task.metadata.type}, and without torch MTEB runs {' and '.join(KINDS)}."
        )
    return task


def _check(model: Any, tasks: Sequence[str], **_: Any) -> None:
    model.need_tokenizer()
    for name in tasks:
        _task(name)


mteb.check = _check
