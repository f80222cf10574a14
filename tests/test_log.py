"""Speed and model FLOPs: what the progress line and the metrics file say of them."""

import dataclasses
import json
import types

import numpy as np
import pytest
from pyarrow import parquet

from jaxpost import recipe
from jaxpost.models.families import architecture
from jaxpost.reporting import log, progress

FIELDS = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
}


ENDLESS = {"seconds": float("inf"), "num_tokens": float("inf")}


@pytest.mark.parametrize("tied", [False, True])
def test_model_flops_by_hand(tied):
    arch = architecture({**FIELDS, "tie_word_embeddings": tied})
    # A layer: q and o 4x4, k and v 4x2, gate, up and down 4x6, two norms of 4; one norm more at the end.
    weights = 2 * (2 * 16 + 2 * 8 + 3 * 24 + 8) + 4
    assert progress.model_flops(arch, 10, 0, 0) == 6 * weights * 10
    assert progress.model_flops(arch, 0, 3, 0) == 6 * 11 * 4 * 3
    assert progress.model_flops(arch, 10, 3, 0, frozen=0.75) == 4.5 * (weights * 10 + 11 * 4 * 3)
    # Scores and values, forward and twice in the backward pass: 2 products x 2 FLOPs x 3, a layer, a head channel, a pair.
    assert progress.model_flops(arch, 0, 0, 5) == 12 * 2 * 4 * 5
    # Documents of 3 and 4 tokens have 6 + 10 causal pairs; where each token sees all of its own, 9 + 16.
    whole = dataclasses.replace(arch, attend="whole")
    pairs = progress.model_flops(whole, 7, 0, 16) - progress.model_flops(arch, 7, 0, 0)
    assert pairs == 12 * 2 * 4 * 25


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(log, "peak_flops", lambda: 1e6)
    return now


def test_speed_is_over_all_steps_since_the_last_row(tmp_path, clock):
    settings = recipe.make(log_every=3, model=FIELDS, steps=9)
    found = types.SimpleNamespace(transformer=types.SimpleNamespace(arch=architecture(FIELDS)))
    trained = found.transformer.arch.parameters()
    plan = types.SimpleNamespace(
        name="train", settings=settings, steps=9, spec=found, source=types.SimpleNamespace(spent={}), trained=trained
    )
    counts = {"num_tokens": 0, "seconds": 0.0}
    written = log.Log(plan, tmp_path, ["train"], counts, 0, ENDLESS)
    for at in range(1, 7):
        written.clock()
        clock[0] += 0.5
        written.waited()
        clock[0] += 1.5 if at < 4 else 3.5
        quiet = {"skipped": 0, "skipped_in_a_row": 0, "loss": 1.0, "grad_norm": 1.0}
        written.step(at, {}, quiet | {"num_tokens": 10 * at, "num_trained": at, "num_pairs": 2 * at})
        if at == 5:
            written.settle()  # as before an evaluation, which takes its own time
            clock[0] += 50.0
    written.settle()
    written.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 6]
    second, third = rows[1:]
    # Steps 2 and 3 took 2 and 2 seconds; their settling, a step later, adds the next step's share to neither twice.
    assert third["num_tokens"] == 210 and third["tokens_per_second"] == pytest.approx(150 / (3 * third["step_time"]))
    assert sum(row["step_time"] * n for row, n in zip(rows, (1, 2, 3), strict=True)) == pytest.approx(3 * 2 + 3 * 4)
    assert third["wait_time"] == second["wait_time"] == pytest.approx(0.5)
    flops = sum(progress.model_flops(found.transformer.arch, 10 * at, at, 2 * at) for at in (4, 5, 6))
    assert third["mfu"] == pytest.approx(flops / (3 * third["step_time"]) / 1e6)


def test_all_completions_are_kept_every_so_many_steps(tmp_path, clock):
    settings = recipe.make(completions=2, model=FIELDS, steps=4)
    found = types.SimpleNamespace(transformer=types.SimpleNamespace(arch=architecture(FIELDS)))
    rows = [{"prompt": "1+1", "completion": "2", "reward": 1.0, "advantage": 0.5}]
    source = types.SimpleNamespace(rows=rows, samples=rows, spent={})
    plan = types.SimpleNamespace(name="rl", settings=settings, steps=4, spec=found, source=source, trained=1)
    written = log.Log(plan, tmp_path, ["rl"], {"num_tokens": 0, "seconds": 0.0}, 0, ENDLESS)
    quiet = {"skipped": 0, "skipped_in_a_row": 0, "loss": 1.0, "grad_norm": 1.0, "num_trained": 1, "num_pairs": 1}
    for at in range(1, 5):
        rows[0]["completion"] = str(at)
        written.clock()
        clock[0] += 1.0
        written.waited()
        written.step(at, {}, quiet | {"num_tokens": 1})
    written.settle()
    written.close()
    files = sorted((tmp_path / "completions" / "rl").iterdir())
    assert [path.name for path in files] == ["00000002.parquet", "00000004.parquet"]
    found = [parquet.read_table(path).to_pylist()[0] for path in files]
    assert [(row["step"], row["completion"], row["advantage"]) for row in found] == [(2, "2", 0.5), (4, "4", 0.5)]


def test_what_batches_took_is_counted_with_the_latest_step_and_goes_on_through_restarts(tmp_path, clock):
    spec = types.SimpleNamespace(transformer=types.SimpleNamespace(arch=architecture(FIELDS)))
    source = types.SimpleNamespace(spent={"generated": 3, "scored": 4})
    settings = recipe.make(log_every=0, steps=99, tokens=50)
    plan = types.SimpleNamespace(name="train", settings=settings, steps=99, spec=spec, source=source, trained=1)
    quiet = {"skipped": 0, "skipped_in_a_row": 0, "loss": 1.0, "grad_norm": 1.0, "num_trained": 1, "num_pairs": 1}
    counts = {"num_tokens": 5, "seconds": 0.0, "spent": {"generated": 10}}
    written = log.Log(plan, tmp_path, ["train"], counts, 0, ENDLESS)
    for _ in range(2):
        written.clock()
        written.step(1, {"segments": np.array([[1, 1, 2, 0], [1, 1, 0, 0]])}, {**quiet, "num_tokens": 5})
    assert written.drawn["num_tokens"] == 15 and written.counts["num_tokens"] == 10  # the second step is not settled
    written.flush()
    assert written.counts["num_tokens"] == 15 and written.counts["spent"] == {"generated": 16, "scored": 8}
    written.close()


def test_a_stage_ends_with_the_step_that_uses_up_its_tokens(tmp_path, clock):
    found = types.SimpleNamespace(transformer=types.SimpleNamespace(arch=architecture(FIELDS)))
    plan = types.SimpleNamespace(
        name="train",
        settings=recipe.make(log_every=0, steps=99),
        steps=99,
        spec=found,
        source=types.SimpleNamespace(spent={}),
        trained=1,
    )
    quiet = {"skipped": 0, "skipped_in_a_row": 0, "loss": 1.0, "grad_norm": 1.0, "num_trained": 1, "num_pairs": 1}
    written = log.Log(plan, tmp_path, ["train"], {"num_tokens": 5, "seconds": 0.0}, 0, {**ENDLESS, "num_tokens": 20})
    ends = []
    for at in range(1, 5):
        written.clock()
        clock[0] += 1.0
        written.step(at, {"segments": np.array([[1, 1, 2, 0], [1, 1, 0, 0]])}, {**quiet, "num_tokens": 5})
        ends.append(written.used_up())
    assert ends == [False, False, True, True]  # 10, 15, 20: no step late, although the third is not settled by then
    written.settle()
    assert written.num_tokens == written.drawn_tokens == 25
    written.close()


ROWS = {
    "data": ({"loss": 2.5, "tokens_per_second": 9.0}, "train 3/9  loss 2.5  tokens_per_second 9"),
    "rollouts": (
        {"loss": 4e-8, "reward": 0.5, "completions/mean_length": 3.0, "kl": 0.25, "frac_reward_zero_std": 0.125, "mfu": 0.1},
        "train 3/9  reward 0.5  length 3  kl 0.25  tied groups 0.125  mfu 0.1",
    ),
    "an evaluation": (
        {"eval/loss": 0.25, "eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/reward": 0.5},
        "train 3/9  eval/loss 0.25  eval/accuracy 50%",
    ),
    "a verifier among rewards": ({"eval/accuracy": 0.5, "eval/reward": 0.7}, "train 3/9  eval/accuracy 50%  eval/reward 0.7"),
    "a reward": ({"eval/reward": 0.5}, "train 3/9  eval/reward 0.5"),
    "no evaluation": ({}, ""),
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_each_log_step_leaves_its_line_with_the_figures_that_matter(monkeypatch, capsys, kind, terminal):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal, raising=False)
    values, line = ROWS[kind]
    shown = progress.Progress("train", 9, 0, quiet=False, budget=float("inf"))
    shown.show(3, values, 1.0)
    shown.close()
    lines = [part.strip() for part in capsys.readouterr().err.replace("\r", "\n").splitlines()]
    assert [part for part in lines if part.startswith("train 3/9")] == [line] * bool(line)
