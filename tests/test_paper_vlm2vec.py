"""configs/papers/vlm2vec.py: its lists, the order of sub-batches, and the figure of models that heed the instruction or not."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.config import resolve
from jaxpost.step import gradients
from jaxpost.tasks import world
from jaxpost.types import Head, Output

PAPER = str(Path(__file__).parent.parent / "configs" / "papers" / "vlm2vec.py")
paper = resolve.find(f"{PAPER}:get_config", "configs").__globals__
KINDS = list(paper["KINDS"])


def test_a_target_states_the_wanted_fact_of_somebody_else():
    task = paper["make"](people=60)
    country = world.make(people=60)
    for index, kind in enumerate(KINDS):
        row = task.conversation(index)
        (first, asked), (second, stated) = paper["drawn"](country, kind, index)
        value = country.facts(first)[kind]
        assert first != second and value == country.facts(second)[kind]
        assert len(set(asked)) == 2 and kind in asked and stated == [kind]
        (positive,) = row["positives"]
        assert value in row["query"] and first in row["query"] and value in positive and second in positive
        assert row["instruction"] == paper["instruction"](kind) and row["positive_ids"] == [row["query_id"]]
        assert paper["make"](people=60, instructed=False).conversation(index) == {**row, "instruction": ""}


def test_sub_batches_are_of_one_kind_and_lose_no_row():
    rows = [{"kind": KINDS[i % 5]} for i in range(203)]
    orders = [paper["sub_batches"](rows, {}, np.array([key, 1], np.uint32), size=8) for key in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(203))
        whole = order[:200].reshape(-1, 8)  # 40 or 41 rows of a kind: five sub-batches of each, and three rows at the end
        assert all(len({rows[i]["kind"] for i in piece}) == 1 for piece in whole)
        assert len({rows[piece[0]]["kind"] for piece in whole[:5]}) > 1
    assert not np.array_equal(*orders)
    mixed = paper["sub_batches"](rows, {}, np.array([0, 1], np.uint32), size=1).reshape(-1, 7)
    assert sorted(mixed.ravel()) == list(range(203)) and all(len({rows[i]["kind"] for i in piece}) > 1 for piece in mixed)


def test_the_loss_and_its_gradient_by_hand():
    # A row is a query and a target of one token each. Rows 0 and 3 want the same fact, so neither is a negative of the other.
    ids = np.array([5, 6, 7, 5])
    batch = {
        "tokens": np.arange(8).reshape(4, 2),
        "segments": np.tile([1, 2], (4, 1)),
        "positions": np.zeros((4, 2), int),
        "mask": np.ones((4, 2)),
        "roles": np.tile([1, 2], (4, 1)),
        "ids": np.stack([ids, ids], axis=1),
    }
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    table = np.random.default_rng(0).normal(size=(8, 3))
    entry = paper["get_config"]().objective.to_dict()
    method = resolve.resolve(entry, "objectives")
    params = {"embed": jnp.asarray(table, jnp.float32)}

    def forward(params, batch):
        return Output(params["embed"][batch["tokens"]], Head(params["embed"]))

    run = jax.jit(lambda params, batch: gradients(forward, method, params, {"embed": None}, batch, jax.random.PRNGKey(0)))
    loss, gradient, _ = run(params, batch)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    unit = table / norms
    q, p = unit[::2], unit[1::2]
    scores = np.where((ids[:, None] == ids) & ~np.eye(4, dtype=bool), -np.inf, q @ p.T / entry["temperature"])
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    assert loss == pytest.approx(-np.log(np.diag(chances)).mean(), rel=1e-5)
    by_score = (chances - np.eye(4)) / 4 / entry["temperature"]
    by_unit = np.stack([by_score @ p, by_score.T @ q], axis=1).reshape(8, 3)
    expected = (by_unit - unit * (by_unit * unit).sum(1, keepdims=True)) / norms
    np.testing.assert_allclose(gradient["embed"], expected, rtol=1e-4, atol=1e-5)


class Reader:
    """Embeds a text as the facts that it states. reads: whether of a query it keeps the kind that the instruction names."""

    def __init__(self, country, reads: bool):
        facts = [country.facts(name) for name in country.people]
        self.values = sorted({(kind, one[kind]) for one in facts for kind in KINDS})
        self.reads = reads

    def embed(self, texts, **options):
        named = {paper["instruction"](kind): kind for kind in KINDS}
        wanted = [next((kind for start, kind in named.items() if text.startswith(start)), None) for text in texts]
        kept = [[value in text and (not self.reads or one in (None, kind)) for kind, value in self.values]
                for text, one in zip(texts, wanted, strict=True)]  # fmt: skip
        return np.array(kept, np.float32)


@pytest.mark.parametrize(
    ("reads", "instructed", "low", "high"), [(True, True, 1, 1), (False, True, 0.3, 0.7), (True, False, 0.3, 0.7)]
)
def test_the_figure_tells_who_heeds_the_instruction(reads, instructed, low, high):
    model = Reader(world.make(people=200, country=1), reads)
    figures = dict(paper["first"](model, per_cell=40, instructed=instructed))
    assert set(figures) == {"first", *KINDS}
    assert figures["first"] == pytest.approx(np.mean([figures[kind] for kind in KINDS]))
    assert low <= figures["first"] <= high
