"""Sources in one batch: shares, padding, columns that only some have, positions, and what is imitated beside rollouts."""

import json

import jax
import numpy as np
import pytest
import runs
import scripted

from jaxpost import recipe, sharding, sources, train
from jaxpost.config.unread import shares
from jaxpost.data import source as data
from jaxpost.errors import UserError
from jaxpost.stages import plan


@pytest.fixture(autouse=True)
def closed():
    """Every source that a test makes is closed."""
    yield
    while scripted.OPEN:
        scripted.OPEN.pop().close()


def batches(rows: int, window: int, local=None) -> data.Batches:
    """Documents of three tokens 10 i, 10 i + 1, ..., two a row, of which all but the first token are learned."""
    examples = [{"tokens": np.arange(3, dtype=np.int32) + 10 * i, "mask": np.arange(3) > 0} for i in range(40)]
    packed = data.rows(examples, [3] * 40, window, seed=0)
    return data.Batches(packed, rows, seed=0, epochs=None, local=local)


def mixed(monkeypatch, window: int = 12, rows: int = 8, **changes) -> sources.Mixed:
    """Six rows of rollouts and two of data."""
    own = {"batch_size": 6, "minibatches": 1, "gives": True, "mesh": sharding.make_mesh(devices=jax.devices()[:1]), **changes}
    rollouts = scripted.rollouts(monkeypatch, **own)
    return sources.mixed(
        {"rollouts": (rollouts, 0.75), "data": (sources.Demonstrations(batches(2, window)), 0.25)}, batch_size=rows
    )


def test_a_batch_has_rows_of_each_and_says_which_is_which(monkeypatch):
    both = mixed(monkeypatch)
    columns, batch = both.columns, both(scripted.state())
    assert {k: (x.shape, x.dtype) for k, x in columns.items()} == {k: (np.shape(x), x.dtype) for k, x in batch.items()}
    assert batch["tokens"].shape == (8, 12)  # ten places of a prompt and a completion, twelve of a row of data
    one = both.sources["rollouts"].config.mesh
    alone, of_data = scripted.rollouts(monkeypatch, batch_size=6, gives=True, mesh=one), batches(2, 12)
    own, rows = alone(scripted.state()), of_data()
    for name in ("tokens", "mask", "old_logps", "advantages", "sampled"):
        np.testing.assert_array_equal(batch[name][:6, :10], own[name])
        assert not batch[name][:6, 10:].any()
    np.testing.assert_array_equal(batch["tokens"][6:], rows["tokens"])
    np.testing.assert_array_equal(batch["demonstrations"][6:], rows["mask"])
    assert not batch["demonstrations"][:6].any() and not batch["mask"][6:].any()
    assert not any(batch[name][6:].any() for name in ("old_logps", "advantages", "sampled"))
    assert batch["temperature"] == own["temperature"] and batch["fresh"]
    assert both.metrics["reward"] == alone.metrics["reward"] and both.rows == alone.rows and len(both.samples) == 4


def test_data_in_longer_rows_of_rollouts_and_behind_shared_prefixes(monkeypatch):
    both = mixed(monkeypatch, window=6, shared=True)
    batch = both(scripted.state())
    assert batch["tokens"].shape == (8, 15) and not batch["tokens"][6:, 6:].any()
    # Each document of data is a branch of its own, behind no prompt.
    np.testing.assert_array_equal(batch["branches"][6:], batch["segments"][6:])


def test_it_goes_on_where_both_were(monkeypatch, tmp_path):
    def run(both, steps):
        return [both(scripted.state(weights=k, step=k)) for k in steps]

    both = mixed(monkeypatch, lag=1)
    both.folder = tmp_path
    first, kept, rest = run(both, range(3)), both.keep(3, []), run(both, range(3, 6))
    assert kept["data"] == 3 and kept["rollouts"]["prompts"] == 12 and (tmp_path / kept["rollouts"]["held"]).exists()
    again = mixed(monkeypatch, lag=1)
    again.folder, again.position = tmp_path, kept
    for one, other in zip(rest, run(again, range(3, 6)), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    fresh = mixed(monkeypatch, lag=1)
    fresh.position = 0
    np.testing.assert_array_equal(run(fresh, range(1))[0]["tokens"], first[0]["tokens"])


def test_each_process_gives_its_own_rows_of_each():
    """Two processes of a mix of data and data: together they give what one gives, a source's rows in the order of both."""

    def of(*locals_):
        each = {name: (batches(4, window, local), 0.5) for name, window, local in zip("ab", (3, 6), locals_, strict=True)}
        return sources.mixed(each, 8)(None)

    whole, halves = of(None, None), [of((0, 2), (0, 2)), of((2, 4), (2, 4))]
    assert [len(half["tokens"]) for half in halves] == [4, 4]
    for name in whole:
        a, b = (half[name] for half in halves)
        np.testing.assert_array_equal(whole[name], np.concatenate([a[:2], b[:2], a[2:], b[2:]]))


def test_a_source_is_told_of_evaluations_and_closed_with_the_others():
    seen = []

    class Adapts(sources.Silent):
        """One that notes what it is told."""

        def like(self):
            return 4, {"tokens": np.zeros(6, np.int32)}

        def evaluated(self, step, figures):
            seen.append((step, figures["eval/loss"]))

        def close(self):
            seen.append("closed")

    both = sources.mixed({"a": (Adapts(), 0.5), "b": (batches(4, 6), 0.5)}, 8)
    both.evaluated(3, {"eval/loss": 0.5})
    both.close()
    assert seen == [(3, 0.5), "closed"]


def test_shares_that_cannot_be_are_refused():
    assert shares("data") == {"data": 1.0} and shares('{"rollouts": 0.5, "data": 0.5}') == {"rollouts": 0.5, "data": 0.5}
    for wrong in (
        {"rollouts": 0.5, "data": 0.25},
        {"rollouts": 1.5, "data": -0.5},
        {"rollouts": 1.0},
        {"rollouts": 0.5, "files": 0.5},
    ):
        with pytest.raises(UserError, match="config.source: .*shares are"):
            shares(wrong)
    assert sources.counts({"rollouts": 0.75, "data": 0.25}, 16, 4) == {"rollouts": 12, "data": 4}
    with pytest.raises(UserError, match="rollouts has 0.75 of config.batch_size=8 rows, which is no multiple of 4"):
        sources.counts({"rollouts": 0.75, "data": 0.25}, 8, 4)
    with pytest.raises(UserError, match="sources: b gives 4 rows a batch, and its share of 16 is 8"):
        sources.mixed({"a": (batches(8, 6), 0.5), "b": (batches(4, 6), 0.5)}, 16)


# ---------------------------------------------------------------------------------------------------------- A stage of both

IMITATES = {"name": "policy_gradient.variant", "of": "policy_gradient.grpo", "added_terms": {"sft": 0.5}}


def chosen(folder, **changes) -> dict:
    """What `recipe.make` takes for a stage of rollouts and the task's demonstrations."""
    settings = runs.settings(folder, source={"rollouts": 0.5, "data": 0.5}, objective=IMITATES, steps=3, **changes)
    return {**settings, "held_out": 0.0, "window": 24}


def test_a_plan_of_both_has_their_columns_and_reads_what_either_reads(tmp_path):
    ((name, s),), mesh = recipe.stages(recipe.make(**chosen(tmp_path))), sharding.make_mesh(2, 2, 2)
    made = plan.plan_stage(name, s, mesh)
    shapes = {k: x.shape for k, x in (made.source.columns | plan.scalars(0, 1)).items()}
    wanted = {k: x.shape for k, x in plan.columns(s, made.objective).items()}
    assert wanted.pop("ref_logps") == shapes["tokens"] == (16, 24) and shapes == wanted
    assert made.data and len(made.sets) == 1
    for changes, says in (
        ({"held_out": 0.1}, "config.held_out: 0.1; rows of files beside rollouts have none"),
        ({"batch_size": 12}, "config.source: data has 0.5 of config.batch_size=12 rows"),
        ({"packing": False, "annotations": "x"}, "config.annotations: 'x'; rows of files"),
    ):
        ((name, s),) = recipe.stages(recipe.make(**{**chosen(tmp_path), **changes}))
        with pytest.raises(UserError, match=says):
            plan.plan_stage(name, s, mesh)


@pytest.mark.slow
def test_a_run_of_both_learns_from_both_and_goes_on(tmp_path):
    train.run(recipe.make(**chosen(tmp_path), save_every=2), tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 3 and all(row["loss/sft"] > 0 and "reward" in row and "kl" in row for row in rows)
    meta = runs.saved(tmp_path / "a", "train")[2][1]
    assert meta["position"]["data"] == 2 and meta["position"]["rollouts"]["calls"] == 2
