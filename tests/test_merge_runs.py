"""Merging between folders, workdirs and stages: one tensor after another, with the same result everywhere.

What a method computes is in tests/test_merging.py; here it is where the tensors come from and go to.
"""

import json

import family_cases as cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toy_tokenizers
import transformers
from safetensors.numpy import load_file, save_file
from test_entry_points import MODEL, command, one_device
from tokenizers import Tokenizer

import jaxpost
from jaxpost import merge, recipe, sharding, tokenizer
from jaxpost.config.resolve import resolve
from jaxpost.data import templates
from jaxpost.errors import UserError
from jaxpost.merging import sparse
from jaxpost.models import hf, layout, loading, tensors
from jaxpost.stages import merge as stage
from jaxpost.storage import checkpoint, fingerprint
from jaxpost.types import TrainState

TIES = {"name": "ties", "density": {"mlp": 0.5, "": [0.2, 0.8]}, "weight": [1.0, 0.5]}


def folder_of(path, seed: int, name: str = "arithmetic", **fields):
    """A Hugging Face folder of a tiny model whose weights are multiples of 1/64, so that many changes are of one magnitude."""
    spec = loading.describe({**MODEL, **fields}, "tasks.arithmetic.tokenizer")
    params = jax.tree.map(lambda x: np.round(np.asarray(x) * 64) / 64, loading.weights(spec, one_device(), seed))
    hf.save(path, params, spec.transformer.arch, spec.config)
    tokenizer.save(spec.tokenizer, path)
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return [folder_of(place / f"model{seed}", seed) for seed in range(3)]


def workdir_of(path, folder: str, *, mean: str = "", base: str = "", head: float = 0.0):
    """A workdir whose checkpoint has a folder's weights. mean: a folder whose layers are the running mean of the layers; base:
    a folder that all but the layers are frozen in; head: a reward head's weights.
    """
    spec, params = loading.open_model(folder, one_device())
    loading.keep_description(spec, path, templates.jinja(spec.tokenizer))
    (path / "config.json").write_text(json.dumps({"stages": ["train"]}))
    meta, frozen = {"done": True}, jax.tree.map(lambda _: None, params)
    if base:
        params, frozen = {**frozen, "layers": params["layers"]}, {**params, "layers": frozen["layers"]}
        meta |= {"base": {"reference": base, "hash": fingerprint.digest(base), "beside": []}}
    if head:
        params, frozen = (
            tree | {"reward_head": {"kernel": x}} for tree, x in ((params, jnp.full((16, 1), head)), (frozen, None))
        )
        meta |= {"leaves": {"reward_head/kernel": ("D1", 0.0)}}
    nothing = jax.tree.map(lambda _: None, params, is_leaf=lambda x: x is None)
    ema = {**nothing, "layers": loading.open_model(mean, one_device())[1]["layers"]} if mean else None
    count = jnp.asarray(3)
    rest = {"opt_state": (), "ema": ema, "key": jax.random.PRNGKey(0), "skipped": count, "streak": count}
    saved = checkpoint.Checkpoints(path / "checkpoints" / "train")
    saved.save(TrainState(step=count, train=params, frozen=frozen, **rest), meta)
    saved.close()
    return str(path)


def file_of(folder) -> dict:
    return load_file(f"{folder}/model.safetensors")


def equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        np.testing.assert_array_equal(x, other[name], err_msg=name)


@pytest.mark.parametrize("name", ["phi3/long", "qwen3_moe/normalised", "gemma2/caps", "olmo2/bias"])
def test_a_models_tensors_are_those_of_its_files_and_make_its_tree(name, tmp_path):
    """Layers and experts apart, fused projections in one."""
    cases.write(tmp_path, name)
    spec, params = loading.open_model(str(tmp_path), one_device())
    arch, files = spec.transformer.arch, file_of(tmp_path)
    opened = tensors.opened(spec)
    assert {k: (x.shape, x.dtype) for k, x in opened.items()} == {k: (x.shape, x.dtype) for k, x in files.items()}
    equal({k: np.concatenate([x[:3], x[3:]]) for k, x in opened.items()}, files)
    equal(tensors.of_tree(params, arch), files)
    jax.tree.map(np.testing.assert_array_equal, tensors.to_tree(files.items(), layout.places(arch)), params)


def test_a_checkpoint_is_read_tensor_by_tensor_with_its_running_mean(folders, tmp_path):
    where = workdir_of(tmp_path, folders[0], mean=folders[1])
    opened = tensors.opened(loading.describe(where))
    first, mean = file_of(folders[0]), file_of(folders[1])
    equal({k: x[:] for k, x in opened.items()}, {k: (mean if ".layers." in k else first)[k] for k in first})


def test_frozen_tensors_of_a_checkpoint_are_read_where_they_are(folders, tmp_path):
    where = workdir_of(tmp_path, folders[0], base=folders[0])
    equal({k: x[:] for k, x in tensors.opened(loading.describe(where)).items()}, file_of(folders[0]))
    held = checkpoint.shapes(checkpoint.find_step(where))
    assert held and all(path.startswith("layers/") for path in held)


@pytest.fixture(scope="module")
def merged(folders):
    """What TIES gives of the three models, tensor by tensor in memory."""
    return sparse.ties(*map(file_of, folders), **{k: v for k, v in TIES.items() if k != "name"})


def test_folders_and_workdirs_give_one_folder(folders, merged, tmp_path):
    base, *tuned = folders
    out = tmp_path / "out"
    names = merge.merge(TIES, tuned, str(out), base=base)
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(names)
    equal(file_of(out), merged)
    model = jaxpost.load(str(out))
    assert model.tokenizer.get_vocab() == tokenizer.load(base).get_vocab() and model.config["model_type"] == "llama"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 3
    (tmp_path / "w").mkdir()
    merge.merge(TIES, [workdir_of(tmp_path / "w", tuned[0]), tuned[1]], str(tmp_path / "again"), base=base)
    equal(file_of(tmp_path / "again"), merged)


def test_a_stage_gives_what_the_command_gives(folders, merged, tmp_path):
    by_name = {r"\.mlp\.": 0.5, "": [0.2, 0.8]}
    entry = {"name": "sparse.ties", "density": [by_name, by_name], "weight": [1.0, {"mlp": 0.5, "": 0.5}]}
    settings = recipe.make(stages=("soup",), soup={"do": "merge", "with": entry, "of": tuple(folders)})
    jaxpost.train(settings, tmp_path / "w")
    spec, params = loading.open_model(str(tmp_path / "w"), one_device())
    equal(tensors.of_tree(params, spec.transformer.arch), merged)
    plan = stage.Merge("soup", settings.soup, spec, resolve(settings.soup["with"].to_dict(), "merging"))
    split = stage._merged(plan, [loading.describe(folder) for folder in folders], sharding.make_mesh(fsdp=2, tensor=2))
    equal(tensors.of_tree(split, spec.transformer.arch), merged)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(split)} == {8}
    jaxpost.train(settings, tmp_path / "w")  # merged before
    assert checkpoint.steps(tmp_path / "w" / "checkpoints" / "soup") == [0]


def test_the_patterns_of_a_stage_keep_their_order():
    patterns = {"mlp": 0.5, "down_proj": 0.1, "reward": {"": [0.2, 0.3]}, "": 1.0}
    for weight in (patterns, [patterns, 1.0]):
        made = recipe.make(do="merge", **{"with": {"name": "linear", "weight": weight}})
        for settings in (
            made,
            recipe.make(stages=("soup",), soup={"do": "merge", "with": {"name": "linear", "weight": weight}}),
        ):
            ((_, s),) = recipe.stages(settings)
            held = stage.entry(recipe.plain(s["with"]))["weight"]
            held = held if weight is patterns else held[0]
            assert [pattern for pattern, _ in held] == list(patterns) and dict(held)["mlp"] == 0.5
            assert dict(held)["reward"] == (("", (0.2, 0.3)),)


@pytest.mark.parametrize("name", ["phi3/long", "qwen3_moe/normalised"])
def test_experts_and_fused_projections_are_merged_as_the_files_have_them(name, tmp_path):
    for number in range(3):
        cases.write(tmp_path / str(number), name)
        rng = np.random.default_rng(number)
        weights = {k: x + rng.integers(-2, 3, x.shape).astype(x.dtype) / 8 for k, x in file_of(tmp_path / str(number)).items()}
        save_file(weights, tmp_path / str(number) / "model.safetensors")
    models = [str(tmp_path / str(number)) for number in range(3)]
    expected = sparse.ties(*map(file_of, models), density=0.3)
    merge.merge({"name": "ties", "density": 0.3}, models[1:], str(tmp_path / "out"), base=models[0], dtype="float32")
    equal(file_of(tmp_path / "out"), expected)
    specs = [loading.describe(model) for model in models]
    plan = stage.Merge("soup", None, specs[0], resolve({"name": "sparse.ties", "density": 0.3}, "merging"))
    equal(tensors.of_tree(stage._merged(plan, specs, one_device()), specs[0].transformer.arch), expected)


def test_a_stage_merges_heads_too_and_the_command_has_no_place_for_them(folders, tmp_path):
    models = []
    for number, head in enumerate((1.0, 3.0)):
        (tmp_path / str(number)).mkdir()
        models.append(workdir_of(tmp_path / str(number), folders[number], head=head))
    soup = {"do": "merge", "with": {"name": "linear", "weight": [{"reward": 3.0, "": 1.0}, 1.0]}, "of": tuple(models)}
    jaxpost.train(recipe.make(stages=("soup",), soup=soup), tmp_path / "w")
    params = loading.open_model(str(tmp_path / "w"), one_device())[1]
    np.testing.assert_array_equal(params["reward_head"]["kernel"], np.full((16, 1), 1.5))  # (3 * 1 + 3) / 4
    one, two = (loading.open_model(folder, one_device())[1] for folder in folders[:2])
    np.testing.assert_allclose(params["embed"]["weight"], (one["embed"]["weight"] + two["embed"]["weight"]) / 2, rtol=1e-6)
    with pytest.raises(UserError, match="it has reward_head/kernel besides the model's weights"):
        merge.merge("linear", models, str(tmp_path / "out"))
    plain = recipe.make(stages=("soup",), soup={**soup, "of": (models[0], folders[1])})
    with pytest.raises(UserError, match="only one of .* has reward_head/kernel"):
        jaxpost.train(plain, tmp_path / "w2")


def test_a_merge_of_whole_models_gets_all_tensors_and_must_give_them_back(folders, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def swapped(params, other, *, least=0.0):\n"
        "    return {**params, 'model.norm.weight': other['model.norm.weight'] + least}\n\n\n"
        "def shorter(params, *others):\n    return {}\n"
    )
    mine.write_text(mine.read_text().replace("params, other, *,", "params, *others,").replace("other[", "others[0]["))
    merge.merge({"name": f"{mine}:swapped", "least": 1.0}, folders[:2], str(tmp_path / "out"))
    norm = "model.norm.weight"
    equal(file_of(tmp_path / "out"), {**file_of(folders[0]), norm: file_of(folders[1])[norm] + 1})
    with pytest.raises(UserError, match="shorter: it gives other names or shapes"):
        merge.merge(f"{mine}:shorter", folders[:2], str(tmp_path / "out2"))


def test_sums_are_float32_and_rounded_once_and_files_are_split(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 4000)
    merge.merge({"name": "linear", "weight": [1.0, 0.3, 0.1]}, folders, str(tmp_path / "out"), dtype="bfloat16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    parts = {name: load_file(tmp_path / "out" / name) for name in set(index["weight_map"].values())}
    assert len(parts) > 2 and index["metadata"]["total_size"] == sum(x.nbytes for part in parts.values() for x in part.values())
    one, two, three = map(file_of, folders)
    for name, x in one.items():
        expected = (x + np.float32(0.3) * two[name] + np.float32(0.1) * three[name]) / np.float32(1.4)
        np.testing.assert_array_equal(parts[index["weight_map"][name]][name], expected.astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert jaxpost.load(str(tmp_path / "out")).params  # the headers are as the library reads them


def test_a_merge_that_was_killed_leaves_no_folder_and_begins_anew(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("jaxpost.export.describe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge.merge("linear", folders, str(out))
    assert not out.exists() and (tmp_path / ".out.unfinished").exists()
    merge.merge("linear", folders, str(out))
    assert {p.name for p in tmp_path.iterdir()} == {"out"} and loading.describe(str(out)).tokenizer is not None


def test_models_that_are_not_of_one_kind_are_refused_before_weights_are_read(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "opened", lambda spec: 1 / 0)
    deep = folder_of(tmp_path / "deep", 0, num_hidden_layers=3)
    hot = folder_of(tmp_path / "hot", 0, rope_theta=500000)
    named = tmp_path / "named"
    folder_of(named, 0)
    text = (named / "tokenizer.json").read_text()
    assert '"7": 11' in text or '"7":11' in text.replace(" ", ""), text[:2000]
    (named / "tokenizer.json").write_text(text.replace('"7"', '"@"'))
    out = str(tmp_path / "out")
    for what, of, base, message in (
        ("linear", [folders[0], deep], "", f"--of: layers is 2 and 3 in {folders[0]} and {deep}"),
        ("linear", [folders[0], hot], "", "--of: kinds.0.rope.theta is 10000.0 and 500000.0"),
        ("linear", [folders[0], str(named)], "", f"tokenizers differ, first in token 11: '7' in {folders[0]}, '@' in {named}"),
        ("ties", folders, "", "--base=... is required: this method changes a base"),
        ("linear", folders, folders[0], "--base=... is no part of this method"),
        ("slerp", folders[:1], folders[1], "slerp needs t"),
        ({"name": "slerp", "t": 0.5}, folders[1:], folders[0], "slerp: it takes 2 models, the base first; 3 given"),
        ({"name": "ties", "density": 2}, folders[1:], folders[0], "ties: density=2: give a share from 0 to 1"),
        ("sparse.tie", folders[1:], folders[0], "'sparse.tie'.* Did you mean 'ties'"),
        ("linear", [folders[0], "/nowhere"], "", "/nowhere: no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            merge.merge(what, of, out, base=base)
    with pytest.raises(UserError, match="is not empty"):
        merge.merge("linear", folders, folders[0])


def test_tokenizers_with_the_same_tokens_may_differ_in_what_they_join():
    one, two = toy_tokenizers.byte_pairs(), toy_tokenizers.byte_pairs()
    stage._check_tokenizers("A", one, "B", two, "of")
    parts = json.loads(two.backend_tokenizer.to_str())
    parts["model"]["merges"].reverse()
    two = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    with pytest.raises(UserError, match="of: the tokenizers differ, first in merge 0: .*'b', 'c'.* in A, .*'Ġ', 'c'.* in B"):
        stage._check_tokenizers("A", one, "B", two, "of")


def test_the_command(folders, merged, tmp_path):
    out = tmp_path / "out"
    base, *tuned = folders
    status, printed, error = command(
        "jaxpost.merge", f"--with={json.dumps(TIES)}", f"--base={base}", *(f"--of={x}" for x in tuned), f"--out={out}"
    )
    assert (status, error) == (0, "") and printed.startswith(f"{out}: ") and "model.safetensors" in printed
    equal(file_of(out), merged)
