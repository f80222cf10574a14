"""The benchmarks: equal work is shown or no ratio is told, all get the same weights and rows, and every command runs."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxpost.data import chat
from jaxpost.models import loading
from jaxpost.objectives import logprobs

ROOT = Path(__file__).parent.parent
ONE = {**os.environ, "XLA_FLAGS": ""}  # one device
FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def side_by_side():
    sys.path.insert(0, str(FOLDER))
    import side_by_side

    yield side_by_side
    sys.path.remove(str(FOLDER))


def round_of(seconds, losses, **more):
    return {"steps": seconds, "losses": losses, "norms": [], "peak_bytes": 2**30, "first": 5.0, "others": 0.0, **more}


def test_a_ratio_is_told_only_of_equal_work(side_by_side):
    losses = [9.0, 8.5, 8.0, 7.5, 7.0, 6.5, 6.0]
    # 100 FLOPs at 0.5 of 400 a second; the second round is slower for all, and only the ratios within a round know it.
    ours = [round_of([0.5, 0.5, 9.0], losses, flops=100, matmul=400), round_of([1.0] * 3, losses, flops=100, matmul=200)]
    near = [round_of([1.0] * 3, losses), round_of([3.0] * 3, losses, peak_bytes=3 * 2**30, first=4.0)]
    near[1]["losses"] = [x + 9e-5 for x in losses[:6]] + [0.0]  # what comes after six steps is not compared
    far = [near[0], {**near[1], "losses": [x + 2e-4 for x in losses]}]
    line = side_by_side.summary("peer", near, ours, 1000)
    assert line["times_slower"] == 2.5 and line["tokens_per_second"] == 500 and line["roofline"] == (0.25 + 1 / 6) / 2
    assert (line["peak_gib"], line["peak_gib_cold"], line["first_step"], line["first_step_cold"]) == (3, 1, 4, 5)
    lines = [side_by_side.summary(name, found, ours, 1000) for name, found in (("near", near), ("far", far))]
    short = side_by_side.summary("short", [{**r, "losses": losses[:5]} for r in near], ours, 1000)
    told = side_by_side.table([*lines, short]).splitlines()
    assert "2.50 times" in told[2] and "9.0e-05" in told[2]
    assert "not equal work" in told[3] and "times" not in told[3] and "2.0e-04" in told[3]
    assert "not equal work" in told[4] and "unknown" in told[4]


def test_a_busy_machine_is_told(side_by_side):
    ours = [round_of([1.0], [9.0] * 6, flops=1, matmul=1, others=share) for share in (0.01, 0.3)]
    job = {"tokens_per_step": 10}
    said = [side_by_side.told([side_by_side.summary("ours", r, r, 10)], {"ours": r}, job) for r in (ours, ours[:1])]
    assert "30% of the machine" in said[0] and "of the machine" not in said[1]


def test_whole_curves_are_compared(side_by_side):
    ours = [round_of([1.0], [3.0, 2.0, 1.0], norms=[8.0, 9.0, 7.0])] * 2
    # One step's loss is not there yet, as where a hook comes late; the second round is 0.5 off in one step.
    found = [round_of([1.0], [3.0, 2.0], norms=[8.0, 9.0, 7.25]), round_of([1.0], [3.0, 2.5], norms=[8.0, 9.0, 7.0])]
    said = side_by_side.apart("peer", found, ours)
    assert "in loss by 5.0e-01 at most and 1.2e-01 in the mean" in said
    assert "Over 6 steps peer" in said and "in gradient's norm by 2.5e-01 at most and 4.2e-02 in the mean" in said
    assert side_by_side.apart("peer", [round_of([1.0], [])] * 2, ours) == ""


def test_where_each_draws_its_own_tokens_other_figures_are_the_proof(side_by_side):
    ours = [
        round_of([0.5], [4.0] * 6, flops=1, matmul=1, proof={"shortest": 64, "first KL": 0.0}, compiled=[7, 7 + late])
        for late in (0, 2)
    ]
    near = {"shortest": 64, "first KL": 9e-5}
    cases = (near, {**near, "shortest": 63}, {**near, "first KL": np.nan}, {"shortest": 64}, {})
    rounds = [[round_of([1.0], [5.0] * 6, proof=proof)] for proof in cases]
    rounds += [
        [round_of([1.0], [5.0] * 6)],
        *([round_of([1.0], [], proof=proof) for proof in pair] for pair in (cases[:2], cases[:3:2])),
    ]
    lines = [side_by_side.summary("peer", found, ours[: len(found)], 10) for found in rounds]
    assert [line["equal_work"] for line in lines] == [True] + [False] * 7
    assert [line["largest_loss_difference"] for line in lines[:2]] == [9e-5, 1] and "2.00 times" in side_by_side.table(lines)
    assert [row.count("unknown") for row in side_by_side.table(lines).splitlines()[2:]] == [0, 0, 0, 0, 1, 1, 0, 0]
    said = side_by_side.told([lines[0]], {"ours": ours, "peer": rounds[0] * 2}, {"tokens_per_step": 10})
    assert "Of ours: shortest 64, first KL 0." in said and "Ours compiled 2 programs after the second step." in said
    assert "differs from ours" not in said  # other tokens' losses are no curve to compare


def test_all_complete_the_same_prompts_and_nothing_stops_them(side_by_side, tmp_path):
    made = side_by_side.competitor.load(FOLDER / "grpo" / "ours.py")
    side_by_side.model.make(tmp_path / "model", "tiny", **made.MODEL)
    job = made.prepare({"model": str(tmp_path / "model"), "steps": 2, "argument": ""}, tmp_path)
    rows, model = np.load(job["rows"]), loading.describe(job["model"])
    assert rows.shape == (2, 2, 64) and len(np.unique(rows[..., 1:])) > 128 and rows[..., 1:].min() >= 3
    task = made.problems(rows.reshape(-1, 64))
    asked = [chat.encode_prompt(task.record(i)["prompt"], model.tokenizer) for i in range(4)]
    np.testing.assert_array_equal(np.reshape(asked, rows.shape), rows)
    assert task.reward({}, "w17 w3 w7") == 2 / 9 and task.reward({}, "") == 0
    # A forward pass over 2 x 64 + 16 x 64 tokens by hand: 2 FLOPs a weight, 4 N H a layer and pair of tokens.
    weights = 2 * (64 * (64 + 64 + 2 * 32) + 3 * 64 * 96) + 2 * (2 * 64 + 2 * 8) + 64  # with its norms
    pairs = 2 * 64 * 65 / 2 + 16 * (64 * 64 + 64 * 65 / 2)
    assert made.passed(job, 2) == pytest.approx(2 * (weights * 18 * 64 + 512 * 64 * 16 * 64) + 4 * 2 * 64 * pairs)


@pytest.mark.parametrize("argument, prompt, answer", [("", 64, 64), ("prefix", 96, 32)])
def test_all_get_the_pairs_that_our_loader_makes(side_by_side, tmp_path, argument, prompt, answer):
    side_by_side.model.make(tmp_path / "model", "tiny")
    prepare = side_by_side.competitor.load(FOLDER / "dpo" / "ours.py").prepare
    job = prepare({"model": str(tmp_path / "model"), "steps": 2, "argument": argument}, tmp_path)
    made = {name: x.reshape(8, -1) for name, x in np.load(job["rows"]).items()}
    assert {name: x.shape[1] for name, x in made.items()} == {"prompt": prompt, "chosen": answer, "rejected": answer}
    # Each turn opens with <bos>, and the answer's ends with <eos>.
    words = [np.concatenate([made["prompt"][i, 1:], made["chosen"][i, 1:-1], made["rejected"][i, 1:-1]]) for i in range(8)]
    assert (made["prompt"][:, 0] == 1).all() and (made["chosen"][:, [0, -1]] == [1, 2]).all()
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    texts = [" ".join(row[name] for name in ("prompt", "chosen", "rejected")).split() for row in rows]
    assert sorted(map(list, words)) == sorted([int(w[1:]) for w in text] for text in texts)


def test_all_get_the_rows_that_our_loader_makes(side_by_side, tmp_path):
    side_by_side.model.make(tmp_path / "model", "tiny")
    spec = loading.describe(str(tmp_path / "model"))
    assert spec.tokenizer("w17 w3 w511 <eos>")["input_ids"] == [17, 3, 511, 2]
    prepare = side_by_side.competitor.load(FOLDER / "sft" / "ours.py").prepare
    rows = np.load(prepare({"model": str(tmp_path / "model"), "steps": 3}, tmp_path)["rows"])
    assert rows.shape == (3, 8, 128) and (rows[..., -1] == 2).all() and (rows[..., :-1] >= 3).all()
    texts = [json.loads(line)["text"].split() for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert sorted(rows[..., :-1].reshape(-1, 127).tolist()) == sorted([int(w[1:]) for w in text] for text in texts)


def test_the_head_costs_its_chunk_and_not_the_logits(side_by_side, monkeypatch):
    import memory

    monkeypatch.setattr(logprobs, "CHUNK", 2**14)
    arch = dataclasses.replace(memory.BASE, vocab=32768, width=16, mlp_width=16, layers=1, heads=1, kv_heads=1, head_width=16)
    needed, seconds = memory.measured(arch, 2, 128, "none")
    assert 0 < needed < 2 * 128 * 32768 * 4 / memory.MIB and seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("workload, start, tolerance", [("sft", np.log(512), 0.1), ("dpo:prefix", np.log(2), 1e-6)])
def test_ours_is_measured_and_what_fails_is_left_out(tmp_path, workload, start, tolerance):
    command = [sys.executable, FOLDER / "side_by_side.py", "--size=tiny", "--steps=6", "--rounds=2", f"--workload={workload}"]
    command += [f"--json={tmp_path / 'found.json'}", f"--peer=trl={shutil.which('false')}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=ONE)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [line["name"] for line in found["lines"]] == ["ours"] and "trl ended with status 1" in done.stderr
    first, second = found["rounds"]["ours"]
    assert first["losses"] == second["losses"] and len(first["losses"]) == 9 and len(first["steps"]) == 6
    # log V of a model that knows nothing, or log 2 of one that is its own reference.
    assert first["losses"][0] == pytest.approx(start, abs=tolerance) and len(first["norms"]) == 9 and min(first["norms"]) > 0
    assert "| ours |" in done.stdout and first["matmul"] > 0 and second["peak_bytes"] > 2**27


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["generate", "grpo:shared"])
def test_ours_completes_to_the_end_and_compiles_nothing_late(tmp_path, workload):
    command = [sys.executable, FOLDER / "side_by_side.py", "--size=tiny", "--steps=6", "--rounds=1", f"--workload={workload}"]
    subprocess.run(
        [*command, f"--json={tmp_path / 'found.json'}"], capture_output=True, text=True, check=True, cwd=ROOT, env=ONE
    )
    (found,) = json.loads((tmp_path / "found.json").read_text())["rounds"]["ours"]
    before, after = found["compiled"]
    assert before == after > 0 and len(found["ends"]) == 9
    # Of 9 x 16 completions none has fewer tokens: not one drew the token that ends it.
    assert found["proof"].pop("shortest") == found["proof"].pop("longest") == 64
    if workload == "generate":
        assert found["proof"] == {"completions a call": 16}
    else:
        # Advantages of a group cancel up to rounding, and the reference is the model as it still is.
        assert abs(found["proof"]["first loss"]) < 1e-5 and abs(found["proof"]["first KL"]) < 1e-6
        assert min(found["norms"]) > 1e-3 and found["proof"]["learned"] == 127328


@pytest.mark.slow
def test_packing_is_measured(tmp_path):
    rows = [{"prompt": "count to " + "one " * (i % 40), "completion": "two " * (i % 7 + 1)} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--size=tiny", "--steps=3", "--rounds=1", "--window=128", f"--data={tmp_path / 'rows.jsonl'}"]
    done = subprocess.run([sys.executable, FOLDER / "packing.py", *options], capture_output=True, text=True, cwd=ROOT, env=ONE)
    assert done.returncode == 0, done.stderr
    fills = [float(line.split("|")[3]) for line in done.stdout.splitlines() if line.startswith(("| packed", "| padded"))]
    assert fills[0] > 0.9 > 0.5 > fills[1] > 0


@pytest.mark.slow
def test_merging_is_measured():
    sizes = ["--layers=2", "--width=64", "--vocab=100", "--rounds=1", "--method=linear", "--method=ties"]
    done = subprocess.run([sys.executable, FOLDER / "merge.py", *sizes], capture_output=True, text=True, cwd=ROOT, env=ONE)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert lines == ["method", "---", "linear", "ties"]
