"""A run that is stopped, in any way and at any moment, is the run that was not.

Everything is compared bit for bit with an uninterrupted run of the same command: parameters, optimizer, running mean, random
key, the data's position, every figure that was logged and every sample. No tolerance applies, since the same program runs on
the same machine. The figures of the clock are left out, and with them the stage whose length the clock decides.
"""

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from jaxpost import recipe, train
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.stages import train as training
from jaxpost.storage import checkpoint, digests, fingerprint
from jaxpost.types import TrainState

PATIENCE = 120  # seconds that a run may take before a test gives up on it: many times what it needs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of the uninterrupted run, and its recipe."""
    folder = tmp_path_factory.mktemp("whole")
    config = runs.write(folder, runs.stages(folder))
    run = runs.start(runs.command(config, folder / "w"))
    _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, errors
    return folder / "w", config


def finish(config, workdir):
    run = runs.start(runs.command(config, workdir))
    _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, errors
    return errors


def when(workdir, stage: str, step: int):
    """Whether the log has come to a step of a stage."""
    place = f'"stage": "{stage}", "step": {step},'
    return lambda: (workdir / "metrics.jsonl").exists() and place in (workdir / "metrics.jsonl").read_text()


def while_saving(workdir, stage: str, after: int):
    """Whether a checkpoint of a stage is being written, `after` steps having been saved."""

    def look():
        names = [p.name for p in (workdir / "checkpoints" / stage).glob("*")]
        return any("tmp" in n for n in names) and any(n.isdigit() and int(n) >= after for n in names)

    return look


def strike(config, workdir, ready, how=signal.SIGKILL, delay: float = 0.0):
    """Starts the command, and signals it as soon as ready() holds; returns (exit status, stderr)."""
    run = runs.start(runs.command(config, workdir))
    end = time.monotonic() + PATIENCE
    while not ready():
        assert run.poll() is None and time.monotonic() < end, "the run was over before its moment came"
        time.sleep(0.0005)
    time.sleep(delay)
    run.send_signal(how)
    _, errors = run.communicate(timeout=PATIENCE)
    return run.returncode, errors


def same(one, other):
    """Holds two finished runs against each other."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        a, b = ([row for row in runs.rows(w / name) if row["stage"] != "control"] for w in (one, other))
        assert a == b
    for stage in ("sft", "reinforce"):
        a, b = runs.saved(one, stage), runs.saved(other, stage)
        assert a.keys() == b.keys()
        for step in a:
            for path, value in a[step][0].items():
                np.testing.assert_array_equal(value, b[step][0][path], err_msg=f"{stage} {step} {path}")
            times = {"seconds"}
            assert {k: v for k, v in a[step][1].items() if k not in times} == {
                k: v for k, v in b[step][1].items() if k not in times
            }


@pytest.mark.slow
def test_a_term_signal_saves_and_a_kill_loses_nothing(whole, tmp_path):
    workdir, config = whole
    status, errors = strike(config, tmp_path, when(tmp_path, "sft", 10), signal.SIGTERM)
    assert status == 0
    assert "all saved; the same command continues" in errors and "Traceback" not in errors
    stopped = max(int(p.name) for p in (tmp_path / "checkpoints" / "sft").iterdir())
    assert f"stopped at sft step {stopped}" in errors and stopped >= 10
    # Once before the stage's first checkpoint, when its rows are there and it starts anew, and once between two of them.
    for step in (1, 14):
        status, _ = strike(config, tmp_path, when(tmp_path, "reinforce", step))
        assert status == -signal.SIGKILL
    finish(config, tmp_path)
    same(workdir, tmp_path)


@pytest.mark.slow
def test_kills_in_generation_in_scoring_and_in_the_update_lose_nothing(whole, tmp_path):
    workdir, config = whole
    found = {}
    for moment, number in (("generation", 4), ("scoring", 2), ("update", 20)):
        command = [sys.executable, str(Path(__file__).with_name("killed.py")), moment, str(number)]
        run = runs.start([*command, f"--config={config}", f"--workdir={tmp_path}"])
        _, errors = run.communicate(timeout=PATIENCE)
        assert run.returncode == -signal.SIGKILL, errors
        found[moment] = runs.rows(tmp_path / "metrics.jsonl")[-1]
        folder = tmp_path / "rollouts" / "reinforce"
        with np.load(folder / "partial.npz") as partial:
            assert moment != "generation" or (0 < len(partial["places"]) < 48 and partial["key"].tolist()[1] == 4)
        # Files of the checkpoints that are left, of the newest, which may be under way, and of the one whose checkpoint was
        # removed after the last save: that file goes with the next one.
        held = {int(path.name[5:13]) for path in folder.glob("held-*")}
        kept = set(checkpoint.steps(tmp_path / "checkpoints" / "reinforce"))
        assert kept <= held and len(held - kept - {max(held)}) <= 1
    # A row is written when the next step is under way. Rollouts 4 are made for step 10, and the third that are judged after the
    # checkpoint of step 8 are asked for at step 16.
    assert {k: row["step"] for k, row in found.items()} == {"generation": 8, "scoring": 14, "update": 19}, found
    finish(config, tmp_path)
    same(workdir, tmp_path)


@pytest.mark.slow
def test_five_kills_at_random_moments_lose_nothing(whole, tmp_path):
    workdir, config = whole
    chance = random.Random(4)
    status, _ = strike(config, tmp_path, while_saving(tmp_path, "sft", 4))
    # Proof that it was struck while saving: what it was writing lies there unfinished.
    assert status == -signal.SIGKILL and list((tmp_path / "checkpoints" / "sft").glob("*tmp*"))
    for stage, steps in (("sft", (9, 28)), ("reinforce", (1, 10)), ("reinforce", (11, 20))):
        moment = when(tmp_path, stage, chance.randint(*steps))
        assert strike(config, tmp_path, moment, delay=chance.random() / 100)[0] == -signal.SIGKILL
    assert strike(config, tmp_path, while_saving(tmp_path, "reinforce", 20))[0] == -signal.SIGKILL
    finish(config, tmp_path)
    same(workdir, tmp_path)


def test_the_figures_of_a_run(whole):
    workdir, _ = whole
    rows = runs.rows(workdir / "metrics.jsonl")
    for stage, evaluated in (("sft", [0, 8, 16, 24, 30]), ("reinforce", [0, 10, 20, 30])):
        own = [row for row in rows if row["stage"] == stage]
        assert [r["step"] for r in own if "loss" in r] == list(range(1, 31))
        assert [r["step"] for r in own if "eval/reward" in r] == evaluated
    assert all(r["grad_norm"] > 0 for r in rows if r["stage"] == "reinforce" and "frac_reward_zero_std" in r)
    # The second stage starts from the first one's running mean, which is what was evaluated.
    last, first = ([r for r in rows if r["stage"] == s and "eval/reward" in r][i] for s, i in (("sft", -1), ("control", 0)))
    assert last["eval/loss"] == first["eval/loss"]


def test_the_control_ends_by_the_time_of_its_stage(whole):
    workdir, _ = whole
    text = (workdir / "metrics.jsonl").read_text()
    seconds = {}
    for stage in ("reinforce", "control"):
        rows = [json.loads(line) for line in text.splitlines()]
        seconds[stage] = [row["step_time"] for row in rows if row["stage"] == stage and "step_time" in row]
    assert len(seconds["reinforce"]) == 30 and len(seconds["control"]) < 100000
    # A step's time is known when the next one is under way, so the control takes one step more than its budget.
    assert sum(seconds["control"][:-2]) < sum(seconds["reinforce"]) <= sum(seconds["control"][:-1]) + 1e-6


def test_a_finished_run_has_nothing_to_do(whole, capsys):
    workdir, config = whole
    before = {p: p.read_bytes() for p in (workdir / "metrics.jsonl", workdir / "samples.jsonl")}
    results = train.run(recipe.make(**runs.stages(config.parent)), workdir)
    assert "sft: finished before, at step 30." in capsys.readouterr().err
    last = json.loads(before[workdir / "metrics.jsonl"].splitlines()[-1])
    assert results == {name: value for name, value in last.items() if name.startswith("eval/")}
    assert before == {p: p.read_bytes() for p in before}


def test_other_settings_are_refused_with_the_difference(whole):
    workdir, config = whole
    kept = (workdir / "config.json").read_bytes()
    changed = runs.stages(config.parent) | {"optimizer": {"lr": 2e-3, "warmup": 0.07}}
    changed["sft"] = changed["sft"] | {"ema": 0.5}
    with pytest.raises(UserError) as refused:
        train.run(recipe.make(**changed), workdir)
    assert "optimizer.lr: 0.001 -> 0.002" in str(refused.value) and "sft.ema: 0.9 -> 0.5" in str(refused.value)
    assert "another workdir" in str(refused.value) and len(str(refused.value).splitlines()) == 4
    assert (workdir / "config.json").read_bytes() == kept


@pytest.mark.slow
def test_data_that_changed_under_a_run_is_refused(tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"{i}+{i}"}) + "\n" for i in range(40)]
    data.write_text("".join(lines))
    chosen = recipe.make(**runs.settings(tmp_path, steps=3, data=str(data), held_out=0))
    monkeypatch.setattr(train.StopRequest, "__enter__", lambda self: setattr(self, "asked", True) or self)
    with pytest.raises(SystemExit):
        train.run(chosen, tmp_path / "w")
    data.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="config.data: .*train was begun with other data"):
        train.run(chosen, tmp_path / "w")
    data.write_text("".join(lines))
    with pytest.raises(SystemExit):
        train.run(chosen, tmp_path / "w")
    assert checkpoint.steps(tmp_path / "w" / "checkpoints" / "train") == [1, 2]


@pytest.mark.parametrize(
    "where, how, status",
    [(where, signal.SIGTERM, 0) for where in ("plan_stage", "_claim", "_introduce", "_check_data", "_start", "_annotated")]
    + [("_start", signal.SIGINT, 130), ("Log", signal.SIGTERM, 0)],
)
def test_a_signal_during_set_up_ends_the_run_at_once(tmp_path, monkeypatch, capsys, where, how, status):
    def struck(*args, **kw):
        signal.raise_signal(how)
        raise AssertionError(f"{where} went on after the signal")

    monkeypatch.setattr(train if where in ("_claim", "_introduce") else training, where, struck)
    monkeypatch.setattr(training, "_start", training._start if where == "_start" else lambda *_: (_State, {}))
    monkeypatch.setattr(training, "_annotated", struck if where == "_annotated" else lambda plan, *_, **kw: plan)
    monkeypatch.setattr(training, "program", lambda *_, **kw: None)
    before = signal.getsignal(how)
    with pytest.raises(SystemExit) as ended:
        train.run(recipe.make(**runs.settings(tmp_path, steps=1)), tmp_path / "w")
    assert ended.value.code == status and "all saved; the same command continues" in capsys.readouterr().err
    assert signal.getsignal(how) is before


class _State:
    """Stands for the train state where no step is taken."""

    step = 0


def test_an_interrupt_asks_once_and_stops_the_second_time():
    with train.StopRequest() as stop:
        stop.in_loop = True
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_settings_that_change_nothing_learned_are_free(whole, capsys):
    workdir, config = whole
    changed = runs.stages(config.parent) | {"log_every": 7, "eval_rows": 3, "mesh": {"data": -1, "fsdp": 2, "tensor": 1}}
    changed["sft"] = changed["sft"] | {"eval_every": 9}
    train.run(recipe.make(**changed), workdir)
    assert "finished before" in capsys.readouterr().err


def test_a_run_starts_from_another_runs_result(whole, tmp_path):
    workdir, _ = whole
    chosen = runs.settings(tmp_path, steps=1, model=str(workdir), tokenizer="")
    train.run(recipe.make(**chosen), tmp_path / "w")
    last, first = (
        [r for r in runs.rows(w / "metrics.jsonl") if "eval/reward" in r][i] for w, i in ((workdir, -1), (tmp_path / "w", 0))
    )
    assert first["eval/reward_greedy"] == last["eval/reward_greedy"]
    assert first["step"] == 0


def test_a_mistake_leaves_the_workdir_free(tmp_path):
    chosen = runs.settings(tmp_path, steps=2, batch_size=8, microbatches=3)
    with pytest.raises(UserError, match="batch_size: 8 rows do not divide over microbatches x data x fsdp = 24"):
        train.run(recipe.make(**chosen), tmp_path / "w")
    assert not (tmp_path / "w").exists()


# ------------------------------------------------------------------------------------------------------ Not finite

POISON = """
import jax.numpy as jnp

from jaxpost.objectives import sft


def poisoned(forward, params, batch, key, *, every):
    terms, metrics = sft.nll(forward, params, batch, key)
    bad = jnp.sum(batch["tokens"]) % every == 0
    return {"nll": terms["nll"]._replace(sum=jnp.where(bad, jnp.nan, terms["nll"].sum))}, metrics
"""


def poisoned(folder, every: int, **changes):
    (folder / "poison.py").write_text(POISON)
    spec = {"name": f"{folder / 'poison.py'}:poisoned", "every": every}
    return recipe.make(**runs.settings(folder, objective=spec, steps=8, eval_per_cell=1, held_out=0, **changes))


def test_updates_that_are_not_finite_are_left_out_and_counted(tmp_path):
    train.run(poisoned(tmp_path, 3), tmp_path / "w")
    rows = [row for row in runs.rows(tmp_path / "w" / "metrics.jsonl") if "loss" in row]
    bad = [row["loss"] is None for row in rows]
    assert 0 < sum(bad) < len(bad) == 8
    assert [row["skipped"] for row in rows] == list(np.cumsum(bad))
    # The learning rate goes by the updates that were made, so a step that was left out does not use its rate up.
    rates = [row["learning_rate"] for row in rows]
    assert all(rates[i + 1] == rates[i] if bad[i] else rates[i + 1] != rates[i] for i in range(7))


def test_too_many_in_a_row_stop_the_run_with_the_batch_saved(tmp_path):
    with pytest.raises(UserError, match=r"train step 3: 3 updates in a row .*nonfinite-train-3-process0.npz") as stopped:
        train.run(poisoned(tmp_path, 1, max_skipped=3), tmp_path / "w")
    assert "lower the learning rate" in str(stopped.value)
    with np.load(tmp_path / "w" / "nonfinite-train-3-process0.npz") as batch:
        assert set(batch) == {"tokens", "segments", "positions", "mask", "step", "progress"}
        assert batch["tokens"].shape == (16, 32) and batch["mask"].any()


# --------------------------------------------------------------------------------------------------- What is kept


def state(step: int) -> TrainState:
    count = jnp.int32(step)
    params = {"w": jnp.full(3, float(step))}
    key = jax.random.PRNGKey(0)
    return TrainState(count, params, {"w": None}, {}, None, key, skipped=count * 0, streak=count * 0)


@pytest.mark.parametrize(("highest", "kept"), [(False, [2, 5, 6]), (True, [4, 5, 6])])
def test_the_last_and_the_best_checkpoints_stay(tmp_path, highest, kept):
    figures = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 4.0, 5: None, 6: 2.0}
    saved = checkpoint.Checkpoints(tmp_path, keep=2, best="eval/loss", highest=highest)
    for step, figure in figures.items():
        saved.save(state(step), {"position": step}, None if figure is None else {"eval/loss": figure, "other": 9.0})
    saved.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == kept
    again = checkpoint.Checkpoints(tmp_path, keep=2, best="eval/loss", highest=highest)
    assert again.latest() == 6 and again.meta(kept[0])["position"] == kept[0]
    again.save(state(7), {}, {"eval/loss": 2.5})
    again.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [kept[0], 6, 7]


# ---------------------------------------------------------------------------------------------------------- Damage


def small(folder: Path, meta: str) -> Path:
    """The parts that a checkpoint has at the least, a file or two in each."""
    for name, content in (("params/d/a", "abc"), ("params/empty", ""), ("optimizer/a", "123456789"), ("meta/metadata", meta)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_digests_are_crc32c_of_whole_files(tmp_path, monkeypatch):
    folder = small(tmp_path, "{}")
    monkeypatch.setattr(digests, "_PIECE", 4)
    digests.write(folder)
    record = json.loads((folder / digests.NAME).read_text())["files"]
    assert record["optimizer/a"] == [9, 0xE3069283, b"6789".hex()]  # the check value of CRC-32C
    assert record["params/empty"] == [0, 0, ""]
    assert digests.damage(folder) is None
    for name in (*record, digests.NAME):
        whole = (folder / name).read_bytes()
        for bit in range(0, 8 * len(whole), 61 if name == digests.NAME else 5):
            flip(folder / name, bit)
            assert digests.damage(folder) == f"{folder / name} was changed"
            (folder / name).write_bytes(whole)
        (folder / name).write_bytes(whole + b"x")
        assert digests.damage(folder).startswith(f"{folder / name} ")
        (folder / name).write_bytes(whole)
    assert digests.damage(folder) is None


def test_a_record_that_is_gone_is_damage_and_an_older_checkpoint_is_taken_with_one_notice(tmp_path, capsys):
    older, newer = small(tmp_path / "1", '{"position": 1}'), small(tmp_path / "2", json.dumps({digests.MARK: digests.NAME}))
    for _ in range(2):
        assert digests.damage(older) is None
    assert capsys.readouterr().err.count(f"{older}: an older jaxpost wrote it, without digests of its files") == 1
    assert digests.damage(newer) == f"{newer / digests.NAME} is missing"
    for content in (b"", b"\xff", b"3"):
        (older / "meta" / "metadata").write_bytes(content)
        assert digests.damage(older) == f"{older / 'meta' / 'metadata'} is missing or was changed"
    shutil.rmtree(older / "optimizer")
    assert digests.damage(older) == f"{older / 'optimizer'} is missing"
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a stage with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two") / "train"
    saved = checkpoint.Checkpoints(folder)
    for step in (1, 2):
        saved.save(state(step), {"position": step})
    saved.close()
    return folder


def files(folder) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "commit_success.txt")


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


DAMAGE = {
    "flipped": lambda file: flip(file, 8 * (file.stat().st_size // 2)),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("kind", [*DAMAGE, "empty folder", "no record"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(two, tmp_path, capsys, kind):
    stage = tmp_path / "train"
    shutil.copytree(two, stage)
    file = next(f for f in files(stage / "2" / "params") if f.name == "manifest.ocdbt")
    if kind == "no record":
        file = stage / "2" / digests.NAME
        file.unlink()
    elif kind == "empty folder":
        file = stage / "2" / "params"
        shutil.rmtree(stage / "2")
        (stage / "2").mkdir()
    else:
        DAMAGE[kind](file)
        with pytest.raises(UserError, match=f"a damaged checkpoint: {file}"):
            checkpoint.find_step(stage / "2")
    assert checkpoint.find_step(stage).name == "1"
    assert f"damaged checkpoint: {file} " in capsys.readouterr().err
    saved = checkpoint.Checkpoints(stage)
    assert f"moved to {stage / 'damaged-2'}, going on from step 1" in capsys.readouterr().err
    assert saved.latest() == 1
    saved.save(state(2), {"position": 2})
    saved.close()
    assert checkpoint.find_step(stage).name == "2" and (stage / "damaged-2").exists()


def test_another_steps_index_does_not_pass_for_this_ones(two, tmp_path):
    # Orbax ends its index with the index's own CRC-32C, over which every such file of one size has the same sum.
    shutil.copytree(two, tmp_path / "train")
    newer, older = (tmp_path / "train" / step / "params" / "manifest.ocdbt" for step in ("2", "1"))
    assert digests.checksum(newer) == digests.checksum(older) and newer.stat().st_size == older.stat().st_size
    shutil.copy(older, newer)
    with pytest.raises(UserError, match=f"{newer} was changed"):
        checkpoint.check(tmp_path / "train" / "2")


def test_what_only_looks_like_a_step_is_none(two, tmp_path):
    stage = tmp_path / "train"
    shutil.copytree(two, stage)
    for name in ("²", "٧", "0007"):
        shutil.copytree(two / "1", stage / name)
    (stage / "9").write_text("")
    assert checkpoint.steps(stage / "9") == [], "a file beside stages (.DS_Store) is none of them"
    (stage / "8").symlink_to("nowhere")
    (stage / "2" / "params" / "link").symlink_to("nowhere")
    assert checkpoint.find_step(stage).name == "2"
    saved = checkpoint.Checkpoints(stage)
    assert saved.latest() == 2 and saved.steps() == [1, 2]
    saved.close()


@pytest.mark.parametrize("file", ["crc32c.json", "meta/metadata"])
def test_json_that_is_nested_too_deep_is_damage(tmp_path, file):
    folder = small(tmp_path, "{}")
    if file == digests.NAME:
        digests.write(folder)
    (folder / file).write_text("[" * 100_000)
    assert digests.damage(folder).startswith(f"{folder / file} ")


META = ["[]", "5", "", "[" * 100_000, '{"base": 5}', '{"base": [1]}', '{"base": {"reference": 5, "hash": "", "beside": []}}']
META += ['{"base": {"reference": "/x"}}', '{"leaves": [1]}', '{"leaves": {"x": 5}}', '{"leaves": {"x": ["Q", 0]}}']


@pytest.mark.parametrize("meta", META, ids=lambda text: text[:40])
def test_a_meta_of_another_shape_is_refused_by_its_file(tmp_path, meta):
    with pytest.raises(UserError, match="meta/metadata: "):
        checkpoint.read_meta(small(tmp_path, meta))


def test_a_base_that_is_itself_elsewhere_is_refused(tmp_path):
    folder = small(tmp_path, "")
    base = {"reference": str(folder), "hash": fingerprint.digest(folder), "beside": []}
    (folder / "meta" / "metadata").write_text(json.dumps({"base": base}))
    with pytest.raises(UserError, match="there they are elsewhere again"):
        loading.base_of(folder, base)


def test_weights_of_another_shape_than_the_description_are_named(two):
    held = checkpoint.paths(two / "2")
    with pytest.raises(UserError, match=rf"holds {held[0]} as \(.*bring back the config.json"):
        checkpoint.load_params(two / "2", jax.tree.map(lambda x: jax.ShapeDtypeStruct((7, *x.shape), x.dtype), state(2).train))


def test_where_no_checkpoint_is_whole_nothing_is_moved(two, tmp_path):
    stage = tmp_path / "train"
    shutil.copytree(two, stage)
    for step in ("1", "2"):
        (stage / step / "meta" / "metadata").write_bytes(b"")
    for read in (checkpoint.find_step, checkpoint.Checkpoints):
        with pytest.raises(UserError, match="none of its checkpoints is whole: .*2/meta/metadata has 0 bytes of "):
            read(stage)
    assert sorted(p.name for p in stage.iterdir()) == ["1", "2"]


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(two, tmp_path):
    step, chance = tmp_path / "2", random.Random(0)
    shutil.copytree(two / "2", step)
    for file in files(step):
        whole = file.read_bytes()
        flip(file, chance.randrange(8 * len(whole)))
        # Orbax's time of the commit is no part of what is restored; all else is noticed, by name.
        if b"commit_timestamp" not in whole or _without_time(file) != _without_time(two / "2" / file.name):
            with pytest.raises(UserError, match=f"{file} was changed"):
                checkpoint.check(step)
        file.write_bytes(whole)
    checkpoint.check(step)


def _without_time(file: Path):
    try:
        return {k: v for k, v in json.loads(file.read_bytes()).items() if k != "commit_timestamp_nsecs"}
    except ValueError:
        return None
