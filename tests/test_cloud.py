"""Everything of a run in an object store, against an emulator on this machine; skipped where the emulator or gcsfs is absent.

What an emulator cannot show is in gcs_emulator.py, and in LOG.md.
"""

import gzip
import json
import shutil
import signal
import time

import jax
import ml_dtypes
import numpy as np
import pyarrow
import pytest
import runs
import tensorstore
from array_record.python import array_record_module
from etils import epath
from pyarrow import parquet
from safetensors.numpy import save_file
from toy_tokenizers import byte_pairs

import jaxpost
from jaxpost import export, recipe, sharding, tokenizer, train
from jaxpost.adapters import peft
from jaxpost.config.resolve import resolve
from jaxpost.data import readers
from jaxpost.errors import UserError
from jaxpost.models import hf, loading, safetensors_io
from jaxpost.reporting import report, writers
from jaxpost.storage import checkpoint, cloud, digests, fingerprint

pytest.importorskip("gcp_storage_emulator")

import gcs_emulator

pytest.importorskip("gcsfs")

PATIENCE = 120  # seconds that a run may take before a test gives up on it: many times what it needs


@pytest.fixture(scope="module")
def bucket():
    """A bucket of this module's own."""
    running = gcs_emulator.start("jaxpost-tests")
    yield cloud.path("gs://jaxpost-tests")
    running.stop()


def test_a_tokenizer_keeps_its_named_templates_in_a_bucket(bucket):
    named = {"default": "{{ messages[0].content }}", "rag": "{{ documents }}"}
    tokenizer.save(byte_pairs(named), bucket / "named")
    assert tokenizer.load(bucket / "named").chat_template == named


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def same(local, remote, stages, files=("metrics.jsonl",)):
    """Holds a finished run on a disk against one in a bucket, bit for bit; what the clock says is left out."""
    for name in files:
        assert runs.rows(remote / name) == runs.rows(local / name)
    for stage in stages:
        a, b = runs.saved(local, stage), runs.saved(remote, stage)
        # Being stopped leaves one more.
        assert a and a.keys() <= b.keys()
        for step in a:
            assert a[step][0].keys() == b[step][0].keys()
            for path, value in a[step][0].items():
                np.testing.assert_array_equal(b[step][0][path], value, err_msg=f"{stage} {step} {path}")
            assert {k: v for k, v in a[step][1].items() if k != "seconds"} == {
                k: v for k, v in b[step][1].items() if k != "seconds"
            }


@pytest.fixture(scope="module")
def workdirs(bucket, tmp_path_factory):
    """A run's workdir on a disk, and one in a bucket whose run was stopped and lost its machine's disk on the way."""
    folder = tmp_path_factory.mktemp("run")
    content = lines({"prompt": f"{i}+{i}", "completion": f"{2 * i}"} for i in range(40))
    (folder / "data.jsonl").write_text(content)
    (bucket / "data" / "rows.jsonl").write_text(content)
    common = runs.settings(folder, task={}, steps=2, held_out=0)
    train.run(recipe.make(data=str(folder / "data.jsonl"), **common), folder / "w")

    config, workdir, disk = recipe.make(data=str(bucket / "data" / "*.jsonl"), **common), bucket / "w", folder / "disk"
    disk.mkdir()
    with pytest.MonkeyPatch.context() as lost:
        lost.setattr(train.StopRequest, "__enter__", lambda self: setattr(self, "asked", True) or self)
        lost.setattr("tempfile.tempdir", str(disk))
        lost.setenv("JAXPOST_CACHE", str(disk / "cache"))
        with pytest.raises(SystemExit):
            train.run(config, str(workdir))
    assert checkpoint.steps(workdir / "checkpoints" / "train") == [1]
    assert any(disk.iterdir())
    shutil.rmtree(disk)
    train.run(config, str(workdir))
    return folder / "w", workdir


def test_a_run_in_a_bucket_is_the_run_on_a_disk_though_the_disk_is_lost(workdirs):
    local, remote = workdirs
    same(local, remote, ["train"])
    assert json.loads((remote / "config.json").read_text())["data"] == "gs://jaxpost-tests/data/*.jsonl"
    assert (remote / "report.html").read_bytes().startswith(b"<!DOCTYPE html>")
    assert list((remote / "tensorboard" / "train").iterdir())


def test_an_export_from_a_bucket_to_a_bucket_is_the_same_model(bucket, workdirs):
    workdir, out, mesh = workdirs[1], bucket / "out", sharding.make_mesh()
    names = export.export(str(workdir), str(out), mesh=mesh)
    assert {p.name for p in out.iterdir()} == set(names) >= {"config.json", "model.safetensors", "tokenizer.json"}
    trained, exported = (jaxpost.load(str(place)) for place in (workdir, out))
    jax.tree.map(np.testing.assert_array_equal, trained.params, exported.params)
    assert exported.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    with pytest.raises(UserError, match="is not empty .it holds"):
        export.export(str(workdir), str(out), mesh=mesh)


def test_a_step_that_was_still_being_written_is_no_checkpoint(workdirs):
    """There is no renaming into place in a bucket: what is whole has a last object that says so."""
    stage = workdirs[1] / "checkpoints" / "train"
    assert checkpoint.find_step(workdirs[1]).name == "2"
    (stage / "3" / "params" / "manifest.ocdbt").write_bytes(b"")
    assert checkpoint.steps(stage)[-1] == 2 and checkpoint.find_step(workdirs[1]).name == "2"


def test_checkpoints_of_a_bucket_are_checked_by_the_sums_that_it_keeps(bucket, monkeypatch):
    folder, read = bucket / "sums" / "1", []
    for name in ("params/d/a", "params/b", "meta/metadata"):
        (folder / name).write_bytes(name.encode() * 9)
    content_of = digests._read
    monkeypatch.setattr(digests, "_read", lambda file: read.append(file) or content_of(file))
    digests.write(folder)
    assert digests.damage(folder) is None and not read, "nothing is downloaded"
    assert {file.size for file in digests._files(folder).values()} >= {90, 72, 117}
    content = (folder / "params/b").read_bytes()
    (folder / "params/b").write_bytes(content[:-1] + b"c")
    assert digests.damage(folder) == f"{folder}/params/b was changed" and not read
    # A store that tells no sums: its objects are read.
    objects = cloud.objects
    monkeypatch.setattr(cloud, "objects", lambda folder: {k: (*v[:2], None) for k, v in objects(folder).items()})
    assert digests.damage(folder) == f"{folder}/params/b was changed" and len(read) == 3
    (folder / "params/b").write_bytes(content)
    assert digests.damage(folder) is None
    monkeypatch.undo()
    with pytest.raises(UserError, match="the bucket jaxpost-test cannot be used .404"):
        digests.damage(cloud.path("gs://jaxpost-test/sums"))


@pytest.mark.slow
def test_killed_with_the_disk_lost_it_ends_as_if_nothing_had_happened(bucket, tmp_path, monkeypatch):
    """The command line, with demonstrations, rollouts, samples and a running mean, struck down between two checkpoints."""
    settings = runs.stages(tmp_path)
    settings |= {"stages": ("sft", "reinforce"), "sft": settings["sft"] | {"steps": 4}}
    settings["reinforce"] |= {"steps": 7, "eval_every": 5}
    del settings["control"]
    config, workdir = runs.write(tmp_path, settings), bucket / "killed"
    run = runs.start(runs.command(config, tmp_path / "w"))
    _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, errors

    disk, stage = tmp_path / "disk", workdir / "checkpoints" / "reinforce"
    for variable in ("TMPDIR", "JAXPOST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(disk))
    disk.mkdir()
    run = runs.start(runs.command(config, workdir))
    end = time.monotonic() + PATIENCE
    while not (stage.exists() and checkpoint.steps(stage)):
        assert run.poll() is None and time.monotonic() < end, run.communicate()[1]
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == -signal.SIGKILL, errors
    assert (stage / "4").exists() and any(disk.iterdir())
    shutil.rmtree(disk)

    disk.mkdir()
    run = runs.start(runs.command(config, workdir))
    _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0 and "sft: finished before, at step 4" in errors, errors
    same(tmp_path / "w", workdir, ["sft", "reinforce"], ("metrics.jsonl", "samples.jsonl"))
    assert report.summary(workdir) == report.summary(tmp_path / "w")
    texts = [jaxpost.load(str(w)).generate("12+34", chat=True, new=6, temperature=1.0) for w in (workdir, tmp_path / "w")]
    assert texts[0] == texts[1]


# ----------------------------------------------------------------------------------------------------- Weights and files


def test_tensors_are_read_in_part_as_from_a_disk(bucket, tmp_path):
    rng, kinds = np.random.default_rng(0), (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
    tensors = {np.dtype(k).name: rng.normal(size=(7, 5, 3)).astype(k) for k in kinds} | {
        "vector": np.arange(4, dtype=np.float32)
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "x.safetensors").read_bytes()
    (bucket / "x.safetensors").write_bytes(content)
    local, remote = (
        safetensors_io.tensors(epath.Path(tmp_path / "x.safetensors")),
        safetensors_io.tensors(bucket / "x.safetensors"),
    )
    assert local.keys() == remote.keys() == tensors.keys()
    everything, some = slice(None), slice(2, 3)
    for name, tensor in tensors.items():
        assert remote[name].get_shape() == local[name].get_shape() == list(tensor.shape)
        assert remote[name].get_dtype() == local[name].get_dtype()
        indices = [(everything,), (some,)] + [(some, slice(1, 3)), (everything, slice(0, 5), some)] * (tensor.ndim == 3)
        for index in indices:
            np.testing.assert_array_equal(remote[name][index], tensor[index])
            np.testing.assert_array_equal(local[name][index], tensor[index])
    for broken in (content[:5], content[:100], content[:-1], content + b"x", b"\xff" * 100):
        (bucket / "broken.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match="gs://.*broken.safetensors: not a whole safetensors file"):
            safetensors_io.tensors(bucket / "broken.safetensors")


def test_weights_in_several_files_go_out_and_come_back(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 40000)
    config = runs.MODEL | {"num_hidden_layers": 1}
    spec = loading.describe(config)
    params = spec.transformer.init(jax.random.PRNGKey(1))
    names = hf.save(bucket / "shards", params, spec.transformer.arch, config)
    assert len(names) > 1
    assert {p.name for p in (bucket / "shards").iterdir()} == {*names, "config.json", "model.safetensors.index.json"}
    hf.save(tmp_path, params, spec.transformer.arch, config)
    assert fingerprint.digest(bucket / "shards") == fingerprint.digest(tmp_path)
    shapes = loading.abstract(spec.transformer, sharding.make_mesh(fsdp=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, hf.load(bucket / "shards", spec.transformer.arch, shapes), params)


def test_an_adapter_goes_out_and_comes_back(bucket):
    config, entry = runs.MODEL | {"num_hidden_layers": 1}, {"name": "lora.lora", "rank": 2, "alpha": 4.0}
    spec = loading.describe(config)
    params = spec.transformer.init(jax.random.PRNGKey(1))
    adapted = resolve(entry, "adapters")(params, jax.random.PRNGKey(2))
    arch = spec.transformer.arch
    assert peft.save(bucket / "adapter", adapted, arch, entry, "a/b") == ["adapter_config.json", "adapter_model.safetensors"]
    again = peft.peft(params, jax.random.PRNGKey(3), folder=str(bucket / "adapter"))
    jax.tree.map(np.testing.assert_array_equal, again, adapted)


def test_data_of_every_kind_is_read(bucket, tmp_path):
    rows = [{"text": f"row {i}"} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "e.arrayrecord"), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()
    files = {"a.jsonl": lines(rows).encode(), "b.json.gz": gzip.compress(json.dumps(rows).encode())}
    files |= {name: (tmp_path / name).read_bytes() for name in ("c.parquet", "e.arrayrecord")} | {
        "d.txt": b"row 0\nrow 1\nrow 2\n"
    }
    for name, content in files.items():
        (bucket / "kinds" / name).write_bytes(content)
        assert [r.row for r in readers.read(str(bucket / "kinds" / name))] == rows
    for several in ("kinds", "kinds/*", "kinds/[ab].json*"):
        found = readers.read(str(bucket / several))
        assert [r.row for r in found] == rows * (2 if "[" in several else 5)
        assert found[0].place == "a.jsonl, line 1"
    with pytest.raises(UserError, match="gs://jaxpost-tests/kinds/f.jsonl: no such file"):
        readers.read(str(bucket / "kinds" / "f.jsonl"))


def test_files_of_a_run_are_replaced_cut_back_and_copied_only_where_they_grew(bucket, monkeypatch):
    workdir = bucket / "files"
    writer = writers.MetricWriter(workdir, {}, ["sft"])
    for step in range(4):
        writer.write("sft", step, {"loss": float(step)})
    writer.samples("sft", 3, [{"prompt": "1"}])
    assert not workdir.exists()
    writer.flush()
    assert [row["step"] for row in writers.read_rows(workdir / "metrics.jsonl")] == [0, 1, 2, 3]
    copied = []
    monkeypatch.setattr(type(workdir), "copy", lambda self, target, overwrite=False: copied.append(self.name))
    writer.write("sft", 4, {"loss": 4.0})
    writer.flush()
    assert {name.partition(".tfevents")[0] for name in copied} == {"metrics.jsonl", "events.out"}
    monkeypatch.undo()
    writers.cut_back(workdir, ["sft"], "sft", 2)
    assert [row["step"] for row in writers.read_rows(workdir / "metrics.jsonl")] == [0, 1, 2]
    assert writers.read_rows(workdir / "samples.jsonl") == []
    assert {p.name for p in workdir.iterdir()} == {"metrics.jsonl", "samples.jsonl", "tensorboard"}


def test_what_another_process_puts_into_a_folder_is_seen(bucket):
    """TensorStore, like another machine, writes past the library that lists."""
    folder = cloud.path("gs://jaxpost-tests/seen")
    (folder / "one").write_text("1")
    assert [p.name for p in folder.iterdir()] == ["one"]
    store = tensorstore.KvStore.open({"driver": "gcs", "bucket": "jaxpost-tests", "path": "seen/"}).result()
    store["two"] = b"2"
    assert sorted(p.name for p in folder.iterdir()) == ["one", "two"] and (folder / "two").exists()


# -------------------------------------------------------------------------------------------------------------- Mistakes


@pytest.mark.parametrize("where", ["s3://bucket/w", "https://host/w"])
def test_other_stores_are_refused(where):
    for call in (lambda: train.run(None, where), lambda: readers.read(where + "/a.jsonl"), lambda: report.write(where)):
        with pytest.raises(UserError, match="only gs:// is known"):
            call()


def test_what_gs_paths_need_and_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(cloud, "_installed", lambda name: name != "gcsfs")
    cloud._prepare.cache_clear()
    for call in (cloud.path, jaxpost.load, lambda w: jaxpost.train(None, w)):
        with pytest.raises(UserError, match=r"need gcsfs, which is not installed; pip install 'jaxpost\[gcs\]'"):
            call("gs://jaxpost-tests/w")
    monkeypatch.undo()
    cloud.path("gs://jaxpost-tests/w")


def test_a_bucket_that_is_not_there_is_named_before_anything_is_compiled(bucket):
    with pytest.raises(UserError, match="gs://jaxpost-test/w: the bucket jaxpost-test cannot be used .404.* gcloud auth"):
        train.run(recipe.make(model=runs.MODEL), "gs://jaxpost-test/w")
