"""Machines that are not here, and whether a recipe fits them.

What needs libtpu skips where it is not installed; the same on simulated devices does not.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import FrozenConfigDict, config_flags
from packaging.requirements import Requirement

from jaxpost import fit, recipe, sharding
from jaxpost.compiled import hlo, program, roofline, search, topology
from jaxpost.compiled.hlo import Collective
from jaxpost.config import resolve
from jaxpost.data import pack, source
from jaxpost.declare import objective
from jaxpost.errors import UserError
from jaxpost.models import families, hub_configs
from jaxpost.rollouts import layout
from jaxpost.rollouts import source as rollouts
from jaxpost.sampling import decode
from jaxpost.stages import plan

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
FOLDER = Path(__file__).parent.parent / "configs" / "tpu"
RECIPES = [f"{p}:{a}" for p in sorted(FOLDER.glob("[!_]*.py")) for a in resolve.find(f"{p}:MACHINES", "configs")]
GIB = topology.GIB


SAMPLING = FrozenConfigDict(
    {"group": 8, "prompt_window": 8, "new": 24, "slots": 8, "segment": 16, "temperature": 1.0, "correction": ""}
)


def tiny(**changes):
    settings = {"model": TINY, "batch_size": 16, "steps": 10, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
    settings |= {"window": 32} if changes.get("source") != "rollouts" else {}
    return recipe.make(**{**settings, **changes})


# ------------------------------------------------------------------------------------------------------------ Machines


@TPU
@pytest.mark.parametrize(
    ("name", "devices", "kind", "slices"),
    [
        ("v5e:2x4", 8, "TPU v5 lite", 1),
        ("v5e:1x1", 1, "TPU v5 lite", 1),
        ("v4:2x2x1", 4, "TPU v4", 1),
        ("v4:1x1x1", 1, "TPU v4", 1),
        ("v5p:2x2x4", 16, "TPU v5", 1),
        ("v6e:4x4*2", 32, "TPU v6 lite", 2),
        ("tpu7x:2x2x1", 8, "TPU7x", 1),
    ],
)
def test_a_topology_is_found_by_its_name(name, devices, kind, slices):
    found = topology.find(name)
    assert (len(found.devices), found.slices, topology.slices_of(found.devices)) == (devices, slices, slices)
    assert {d.device_kind for d in found.devices} == {kind}


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:4x4*0", "cpu", "tpu:8"])
def test_an_unknown_topology_is_refused_with_those_there_are(name):
    with pytest.raises(UserError, match=r"v5e, v6e have shapes 1x1 2x2 2x4.*v5p.*cpu:N"):
        topology.find(name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v6e-8", "v6e:2x4"),
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v4-8", "v4:2x2x1"),
        ("v5p-64", "v5p:2x4x4"),
        ("tpu7x-8", "tpu7x:2x2x1"),
        ("v3-32", "v3:4x4"),
        ("v6e-16*2", "v6e:4x4*2"),
        ("v5p:2x2x4", "v5p:2x2x4"),
        ("v5p-2", "v5p:1x1x1"),  # one chip, of two TensorCores
        ("tpu7x-2", "tpu7x:1x1x1"),
        ("V6E-8", "v6e:2x4"),
        ("V5P:2X2X4*2", "v5p:2x2x4*2"),
        (" CPU:8\n", "cpu:8"),
        ("v5litepod:2x4", "v5e:2x4"),
        ("v7x-8", "tpu7x:2x2x1"),
        ("v9-8", "v9-8"),
    ],
)
def test_an_accelerator_type_is_the_shape_of_its_size(name, shape):
    assert topology.shaped(name) == shape


@pytest.mark.parametrize(
    ("name", "near"), [("v6e-12", r"12 chips.*v6e-8 \(v6e:2x4\)"), ("v4-4", r"4 TensorCores.*v4-8 \(v4:2x2x1\)")]
)
def test_an_unknown_size_is_refused_with_the_nearest(name, near):
    with pytest.raises(UserError, match=near):
        topology.find(name)


@pytest.mark.parametrize(("version", "fits"), [("0.0.42.1", True), ("0.0.42", True), ("0.0.52", False), ("0.0.41", False)])
def test_another_libtpu_than_jax_asks_for_is_refused_with_the_command(monkeypatch, version, fits):
    monkeypatch.setattr(
        topology.importlib.util, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=["/site/libtpu"])
    )
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/site/libtpu/libtpu.so")  # jax sets it as it is imported
    monkeypatch.setattr(topology.importlib.metadata, "requires", lambda _: ["numpy", 'libtpu==0.0.42.*; extra == "tpu"'])
    monkeypatch.setattr(topology.importlib.metadata, "version", {"libtpu": version, "jax": "0.10.2"}.get)
    if fits:
        topology._check_compiler()
        return
    with pytest.raises(UserError, match=rf"libtpu {version} is installed, and jax 0.10.2 .*pip install 'libtpu==0.0.42.\*'"):
        topology._check_compiler()


@pytest.mark.parametrize(
    ("package", "library", "refused"),
    [
        (["/site/libtpu"], "/site/libtpu/libtpu.so", True),
        (["/site/libtpu"], "/site/libtpu2/libtpu.so", False),  # one of the user's own
        (["/site/libtpu"], "", True),
        (None, "/site/libtpu/libtpu.so", True),  # a module, not a folder
        ([], "/site/libtpu/libtpu.so", True),
    ],
)
def test_only_the_packages_own_library_has_the_packages_version(monkeypatch, package, library, refused):
    """No package has an origin here, as one without __init__.py has none."""
    spec = SimpleNamespace(origin=None, submodule_search_locations=package)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setenv("TPU_LIBRARY_PATH", library)
    monkeypatch.setattr(topology.importlib.metadata, "requires", lambda _: ['libtpu==0.0.42.*; extra == "tpu"'])
    monkeypatch.setattr(topology.importlib.metadata, "version", {"libtpu": "0.0.41", "jax": "0.10.2"}.get)
    with pytest.raises(UserError, match="libtpu 0.0.41 is installed") if refused else contextlib.nullcontext():
        topology._check_compiler()


def test_the_extra_asks_for_what_jax_asks_for():
    """The extra is jax's own, and the installed jax names a libtpu in it, so that the check above has something to compare; the
    installed libtpu, where there is one, is of that version.
    """
    setup = (Path(__file__).parent.parent / "setup.py").read_text()
    assert '"fit": ["jax[tpu]"]' in setup
    wanted = [Requirement(text) for text in metadata.requires("jax")]
    named = [r for r in wanted if r.name == "libtpu" and r.marker and r.marker.evaluate({"extra": "tpu"})]
    assert len(named) == 1 and not named[0].specifier.contains("9999")
    if importlib.util.find_spec("libtpu"):
        assert named[0].specifier.contains(metadata.version("libtpu"))


@pytest.mark.slow
def test_the_extra_is_installed_and_compiles(tmp_path):
    """The README's command in a new environment, which has the packages of this one, so that only what lacks is fetched."""
    pip, tree, source = [sys.executable, "-m", "pip"], Path(__file__).parent.parent, tmp_path / "source"
    probe = [*pip, "download", "-q", "--no-deps", "--no-cache-dir", "--retries=0", f"--dest={tmp_path / 'probe'}", "packaging"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no package index answers")
    for name in ("jaxpost", "configs"):
        shutil.copytree(tree / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(tree / name, source)
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    ours, theirs = sysconfig.get_path("purelib"), sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
    (Path(theirs) / "ours.pth").write_text(ours + "\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TPU_LIBRARY_PATH")}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run(*pip, "--python", python, "install", "-q", f"{source}[fit]")
    settings = {"model": TINY, "window": 32, "batch_size": 2}
    (tmp_path / "tiny.py").write_text(f"from jaxpost import recipe\n\nget_config = lambda: recipe.make(**{settings})\n")
    assert run(python, "-m", "jaxpost.fit", "--config=tiny.py", "--topology=V5E-1").startswith("FITS: train's step")
    shutil.rmtree(tmp_path / "venv")  # of 700 MB, which pytest would keep for three runs


def test_devices_are_simulated_by_a_name_in_capitals(monkeypatch):
    monkeypatch.setattr(topology.jax.config, "update", lambda key, value: changed.update({key: value}))
    changed = {}
    topology.simulate("CPU:4")
    assert changed == {"jax_platforms": "cpu", "jax_num_cpu_devices": 4}


def test_more_devices_than_were_simulated_are_refused():
    assert len(topology.find("cpu:4").devices) == 4
    with pytest.raises(UserError, match="started with 8 simulated devices"):
        topology.find("cpu:16")


def test_without_libtpu_the_extra_is_named(monkeypatch):
    def absent(**_):
        raise RuntimeError("libtpu.so is not found")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", absent)
    with pytest.raises(UserError, match=r"pip install 'jaxpost\[fit\]'"):
        topology.find("v5e:2x4")


@TPU
def test_a_group_has_the_links_of_the_axes_that_it_spans():
    flat, cube, pod = topology.find("v5e:4x4"), topology.find("v5p:4x4x4"), topology.find("v5e:16x16")
    row = [d for d in flat.devices if d.coords[0] == 0]
    assert topology.links(flat, row) == 1  # four in a line, which a v5e closes to a ring at sixteen
    assert topology.links(flat, flat.devices) == 2
    assert topology.links(flat, [d for d in row if d.coords[1] % 2]) == 1  # at least one, though shared
    assert topology.links(cube, cube.devices) == 6
    assert topology.links(cube, [d for d in cube.devices if d.coords[2] == 1]) == 4
    assert topology.links(pod, [d for d in pod.devices if d.coords[0] == 3]) == 2


@TPU
def test_fsdp_lies_on_two_axes_of_a_torus_and_data_across_slices():
    cube = topology.find("v5p:4x4x4")
    mesh = sharding.make_mesh(4, 16, 1, devices=cube.devices)
    assert all(topology.torus_axes(list(mesh.devices[i, :, 0])) == 2 for i in range(4))
    sharding.make_mesh(2, 32, 1, devices=cube.devices)  # splits an axis of the torus
    two = topology.find("v6e:2x2*2")
    mesh = sharding.make_mesh(2, 4, 1, devices=two.devices)
    assert [topology.slices_of(list(mesh.devices[i, :, 0])) for i in (0, 1)] == [1, 1]
    assert topology.slices_of(list(mesh.devices[:, 0, 0])) == 2
    with pytest.raises(UserError, match="data=1 is no multiple of the 2 slices"):
        sharding.make_mesh(1, 8, 1, devices=two.devices)


# ----------------------------------------------------------------------------------------------------------- The model


def test_known_models_have_the_sizes_they_are_called_by():
    counts = {n: families.architecture(hub_configs.fields(n)).parameters() for n in hub_configs.names()}
    assert counts == {
        "meta-llama/Llama-3.1-8B": 8030261248,
        "meta-llama/Llama-3.1-70B": 70553706496,
        "Qwen/Qwen3-1.7B": 1720574976,
        "Qwen/Qwen3-8B": 8190735360,
        "Qwen/Qwen3-32B": 32762123264,
        "Qwen/Qwen3-30B-A3B": 30532122624,
        "google/gemma-3-12b-pt": 11766034176,
    }
    assert hub_configs.fields("google/gemma-3-12b-it") == hub_configs.fields("google/gemma-3-12b-pt")
    assert hub_configs.fields("Qwen/Qwen3-8B-Base") == hub_configs.fields("Qwen/Qwen3-8B") | {"max_position_embeddings": 32768}
    assert hub_configs.fields("x/y") is None


def test_the_columns_of_a_batch_are_those_that_a_source_makes():
    def shapes(batch):
        return {k: (np.shape(x), np.asarray(x).dtype) for k, x in batch.items()}

    def told(columns):
        return {k: (x.shape, x.dtype) for k, x in columns.items()}

    rows = source.rows([{"tokens": np.arange(5, dtype=np.int32), "mask": np.ones(5, bool)}], [5], 32, seed=0)
    batch = source.Batches(rows, 16, seed=0)()
    assert told(source.columns(16, 32)) == shapes(batch) == {k: ((16, 32), x.dtype) for k, x in pack.empty(32).items()}

    for shared, together in ((False, 1), (True, 8)):
        where = layout.laid_out([np.arange(4)] * 2 * together, np.full(16 * together, 3), together, 8, 24, shared)
        numbers = where.spread(np.zeros((16 * together, 24), np.float32))
        wanted = {**where.columns, "old_logps": numbers, "advantages": numbers}
        wanted |= {"temperature": np.float32(1.0), "fresh": np.bool_(True)}
        assert told(rollouts.Rows(16, SAMPLING.group, 8, 24, shared=shared).columns()) == shapes(wanted)


def test_the_sampler_is_described_as_it_runs(monkeypatch):
    """What the programs are said to take is what `stream` gives them; nothing is compiled."""
    mesh = sharding.make_mesh(2, 2, 2)
    rl = {"source": "rollouts", "objective": {"name": "policy_gradient.reinforce"}, "rollouts": dict(SAMPLING)}
    ((_, settings),) = recipe.stages(tiny(**rl))
    programs = {made.name: made for made in program.prepared(settings, mesh).programs}
    prefill, segment = programs["prefill"], programs["decode"]
    seen = {}

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)

    def noted(name, result):
        def call(model, *arguments, **keywords):
            seen[name] = (shapes(arguments), keywords)
            return result(arguments)

        monkeypatch.setattr(decode, name, call)

    noted("prefill", lambda _: segment.arguments[2])
    noted("begin", lambda _: segment.arguments[4])
    monkeypatch.setattr(decode, "ready", lambda *_: prefill.arguments[1])
    ended = {"tokens": np.zeros((16, 24), np.int32), "logps": np.zeros((16, 24))}
    ended |= {"lengths": np.ones(16, int), "stopped": np.ones(16, bool), "done": np.ones(16, bool)}
    noted("segment", lambda arguments: (arguments[3], ended))
    prompts = [np.arange(1, 4)] * (16 // SAMPLING.group)
    about = {"prompt_window": 8, "new": 24, "slots": 8, "group": SAMPLING.group, "turns": SAMPLING.segment, "stop": (1, 2)}
    assert sum(map(len, decode.stream(None, None, prompts, mesh=mesh, **about))) == 16
    assert seen["prefill"] == (shapes(prefill.arguments[1:]), prefill.keywords)
    assert seen["segment"] == (shapes(segment.arguments[1:]), {**segment.keywords, "chain": ()})


def rollouts_of(objective: str, **options):
    """A tiny stage that learns from rollouts: its programs by name, and the mesh they are for."""
    config = tiny(source="rollouts", objective={"name": f"policy_gradient.{objective}", **options}, rollouts=dict(SAMPLING))
    ((_, settings),), mesh = recipe.stages(config), sharding.make_mesh(2, 2, 2)
    return {made.name: made for made in program.prepared(settings, mesh).programs}, mesh


def test_what_is_there_while_a_program_runs_is_given_to_it_or_waits():
    programs, _ = rollouts_of("grpo", beta=0.04)
    assert list(programs) == ["step", "prepare", "prefill", "decode", "reference"]
    held = {kind: program.bytes_held(x) for kind, x in programs["step"].held.items()}
    assert held["reference"] == held["weights"] > 0  # a copy of what trains
    for made in programs.values():
        given = program.bytes_held([x for x in jax.tree.leaves(made.arguments) if isinstance(x, jax.ShapeDtypeStruct)])
        waiting = sum(held.get(kind, 0) for kind in made.waiting)
        whole = sum(map(program.bytes_held, made.held.values()))
        # The step's count and key, and what a segment is told besides, are of no kind.
        assert 0 <= given + waiting - whole < 100, made.name
        assert whole >= sum(held[kind] for kind in ("weights", "optimizer", "reference"))
    assert list(rollouts_of("grpo", beta=0.0)[0]) == ["step", "prepare", "prefill", "decode"]


def test_a_turn_of_decoding_sends_only_what_tensor_parallelism_needs():
    programs, mesh = rollouts_of("reinforce")
    with sharding.use(mesh), program._uncached():  # what comes from the cache may have an older program's names
        lowered = programs["decode"].function.lower(*programs["decode"].arguments, **programs["decode"].keywords)
        found = hlo.collectives(hlo.parse(lowered.compile().as_text()), dict(mesh.shape))
    turn = [c for c in found if "at_most_24_times/while/body" in c.name]
    assert turn and {(c.axes, c.times) for c in turn} == {("tensor", 24.0)}
    # Caches and banks stay where they are, in a refill as well; what the host looks at is gathered once.
    assert not [c for c in found if "while/body" in c.name and c.axes != "tensor"]


def test_an_objective_may_read_columns_of_its_own():
    @objective(columns={"ref_logps": ("BS", "float32"), "rated": ("B", "bool"), "tokens": ("BS", "float32")})
    def mine(forward, params, batch, key):
        """Reads what a reference said."""

    found = plan.columns(tiny(), resolve.bind(mine, {}, "mine"))
    assert (found["ref_logps"].shape, found["ref_logps"].dtype) == ((16, 32), np.float32)
    assert (found["rated"].shape, found["rated"].dtype) == ((16,), np.bool_)
    assert found["tokens"].dtype == np.int32  # the source's own


# ------------------------------------------------------------------------------------------------------- A whole report


@pytest.fixture(scope="module")
def report():
    return fit.report(tiny(), "cpu:8")


def test_a_report_says_where_the_memory_goes(report):
    (stage,) = report["stages"]
    (step,) = stage["programs"]
    mesh, hbm = sharding.make_mesh(2, 2, 2), step["hbm"]
    state = program.prepared(recipe.stages(tiny())[0][1], mesh).programs[0].arguments[0]
    pieces = sum(4 * np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.train))
    # Of each kernel a quarter, of each norm (32 numbers, five of them) the whole.
    matrices = 2 * 96 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert hbm["weights"] == pieces == 4 * (matrices / 4 + 5 * 32)
    assert hbm["optimizer"] == 2 * hbm["weights"] + 8  # two moments, two counters
    assert hbm["inputs"] == 16 / 4 * 32 * (3 * 4 + 1) + 8  # three columns of int32, a mask, and two scalars
    assert hbm["total"] == pytest.approx(sum(hbm[k] for k in hbm if k not in ("total", "limit")), rel=0.02)
    assert stage["fits"] and report["fits"] and stage["parameters"] == matrices + 5 * 32


def test_a_report_says_what_is_computed_and_sent(report):
    (step,) = report["stages"][0]["programs"]
    # Six for every weight and token, four products of attention forward and twice that back; the head's loop says how often it
    # turns at most, or counts once.
    tokens, layer = 16 * 32, 4 * 32 * 32 + 3 * 32 * 64
    least = (6 * 2 * layer * tokens + 3 * 2 * 4 * 16 * 32 * 32 * 32) / 8
    assert least < step["flops"] <= least + 8 * 96 * 32 * tokens / 8
    gathered = {c["axes"]: c["bytes"] for c in step["collectives"] if c["kind"] == "all-gather"}
    # Each kernel and the head once: the half that is elsewhere, of what tensor leaves; and for the lookup less than the table.
    assert 0 <= gathered["fsdp"] - (2 * layer + 96 * 32) / 2 / 2 * 4 < 96 * 32 / 2 / 2 * 4
    assert "seconds" not in step and not step["given_up"] and step["compile_seconds"] > 0


def test_the_table_is_the_report(report):
    text = fit.table(report)
    assert text.startswith("FITS: train's step takes most, ")
    assert "cpu:8: 8 devices, mesh data=2 fsdp=2 tensor=2" in text
    assert "train: 26,784 parameters; 16 rows of 32 tokens in 1 microbatches, float32, remat none" in text
    assert "all-gather along fsdp" in text and "fits" in text and "modelled" not in text
    assert json.loads(json.dumps(report)) == report
    constrained = {**report["stages"][0], "uncounted": "rollouts.processors"}
    assert "not counted: what rollouts.processors cost" in fit.table({**report, "stages": [constrained]})
    assert "not counted" not in text


# ----------------------------------------------------------------------------------------------- Remedies and the search


def _machine(hbm=4.0):
    chip = topology.CHIPS["v5e"]._replace(hbm=hbm)
    return topology.Topology("v5e:2x4", jax.devices(), chip)


@pytest.fixture
def stubbed(monkeypatch):
    """fit.report with a compiler that finds 8 bytes, halved by each doubling of microbatches, and by remat."""
    seen = []

    def measured(s, mesh, machine, traced):
        total = 8e8 / s.microbatches / (1 if s.remat == "none" else 2) * (1 if s.dtype == "float32" else 0.5)
        seen.append((s.remat, s.microbatches, dict(mesh.shape), s.dtype))
        hbm = {"temporaries": total, "total": total, "limit": machine.chip.hbm}
        times = {"compute": 1.0, "memory": 1.0, "overlapped": 1.0 / mesh.shape["fsdp"], "serial": 2.0}
        more = {"flops": 1.0, "traffic": 1.0, "collectives": [], "seconds": times, "given_up": []}
        named = {"program": "step", "lower_seconds": 0.0, "compile_seconds": 0.0}
        return {**named, "fits": total <= machine.chip.hbm, "hbm": hbm, **more}

    monkeypatch.setattr(program, "measured", measured)
    return seen


def _report(monkeypatch, hbm, **options):
    monkeypatch.setattr(topology, "find", lambda name: _machine(1e8 * hbm))
    return fit.report(tiny(mesh={"data": 8}), "v5e:2x4", **options)


@pytest.mark.parametrize(
    ("hbm", "flags"),
    [
        (4.0, "--config.remat=dots"),
        (2.0, "--config.remat=full --config.microbatches=2"),
        # Two rows a device allow no more than two microbatches, and half the numbers' size comes before another mesh; where
        # tensor takes devices, there are more rows.
        (1.0, "--config.remat=full --config.microbatches=2 --config.dtype=bfloat16"),
        (
            0.5,
            "--config.remat=full --config.microbatches=4 --config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=2 "
            "--config.dtype=bfloat16",
        ),
    ],
)
def test_the_cheapest_remedy_that_fits_is_named(stubbed, monkeypatch, hbm, flags):
    found = _report(monkeypatch, hbm)["stages"][0]
    assert found["remedy"]["flags"] == flags and not found["fits"]
    assert found["remedy"]["tried"] == len(stubbed) - 1
    assert f"it fits with\n  {flags}" in fit.table({**found, "topology": "", "devices": 8, "mesh": {}, "stages": [found]})


def test_each_compilation_is_announced_and_told_at_once(stubbed, monkeypatch):
    _report(monkeypatch, 4.0, progress=(lines := []).append)
    assert lines == [
        "train: compiling step, 1 of 1",
        "train: step: 762.94 MiB of 381.47 MiB: DOES NOT FIT, in 0 s",
        "--config.remat=dots: compiling step, 1 of 1",
        "--config.remat=dots: step: 381.47 MiB of 381.47 MiB: fits, in 0 s",
    ]


def test_remedies_come_cheapest_first_and_divide():
    s = recipe.stages(tiny(batch_size=24, microbatches=1, remat="dots"))[0][1]
    ways = list(search.remedies(s, sharding.make_mesh(4, 2, 1)))
    ways = [way for way in ways if way.get("remat") != "attention"]
    cast = [way for way in ways if "dtype" in way]
    assert ways[:2] == [{"remat": "full"}, {"dtype": "bfloat16"}] and len(cast) == len(ways) // 2 + 1
    ways = [way for way in ways if way not in cast]
    assert ways[:2] == [{"remat": "full"}, {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1}]  # three rows a device: no halves
    assert ways[4:6] == [
        {**m, "mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}
        for m in ({"remat": "full"}, {"remat": "full", "microbatches": 2})
    ]
    assert (
        search.flags(ways[4], "sft")
        == "--config.sft.remat=full --config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=2"
    )
    two = list(search.remedies(s, sharding.make_mesh(4, 2, 1), slices=2))
    assert {way["mesh.data"] for way in two if "mesh.data" in way} == {2}


def test_where_nothing_helps_the_state_is_named(stubbed, monkeypatch):
    found = _report(monkeypatch, 1e-8)
    assert found["stages"][0]["remedy"] == {"settings": None, "tried": 0} and not found["fits"]
    text = fit.table(found)
    assert "nothing makes it fit here: weights and optimizer alone take" in text
    assert "take a larger topology, an adapter, or a quantised base" in text


def test_the_search_compiles_the_few_best_and_takes_the_fastest(stubbed, monkeypatch):
    monkeypatch.setattr(
        search, "candidates", lambda s, machine: [(1, {"mesh.data": 8 // f, "mesh.fsdp": f}) for f in (1, 8, 2)]
    )
    (stage,) = _report(monkeypatch, 8.0, best=True)["stages"]
    assert [c["settings"]["mesh.fsdp"] for c in stage["search"]["tried"]] == [8, 2, 1]


def test_candidates_divide_and_are_estimated_to_fit():
    s = recipe.stages(tiny())[0][1]
    found = search.candidates(s, _machine(16 * GIB))
    ways = [way for _, way in found]
    assert {"microbatches": 2, "mesh.data": 8, "mesh.fsdp": 1, "mesh.tensor": 1} in ways
    assert all(16 % (w["microbatches"] * w["mesh.data"] * w["mesh.fsdp"]) == 0 and w["mesh.tensor"] <= 4 for w in ways)
    assert [t for t, _ in found] == sorted(t for t, _ in found)
    assert search.candidates(s, _machine(1e4)) == []


# ------------------------------------------------------------------------------------------------------------ The time


def test_a_step_takes_as_long_as_its_longest_part():
    chip = topology.Chip(hbm=1, peak=100.0, bandwidth=10.0, link=1.0, dcn=1.0, wrap=4)
    found = roofline.times(topology.Topology("", [], chip), 300.0, 20.0, 4.0, 1.0)
    assert found == {"compute": 3.0, "memory": 2.0, "links": 4.0, "network": 1.0, "overlapped": 4.0, "serial": 8.0}
    found = roofline.times(topology.Topology("", [], chip), 100.0, 20.0, 1.0, 1.0)  # arithmetic waits for memory
    assert (found["overlapped"], found["serial"]) == (2.0, 4.0)


@TPU
def test_a_collective_takes_its_bytes_over_its_links():
    machine = topology.find("v5e:2x4")
    mesh = sharding.make_mesh(1, 8, 1, devices=machine.devices)
    devices, link = list(mesh.devices.flat), machine.chip.link
    gather = Collective("all-gather", "fsdp", tuple(range(8)), 8e9, 7e9, 3.0, "")
    assert roofline.seconds(machine, devices, gather) == (pytest.approx(3 * 7e9 / (2 * link)), 0.0)
    exchange = gather._replace(kind="all-to-all")
    assert roofline.seconds(machine, devices, exchange)[0] == pytest.approx(2 * 3 * 7e9 / (2 * link))
    far = gather._replace(kind="all-reduce between slices")
    assert roofline.seconds(machine, devices, far) == (0.0, pytest.approx(3 * 7e9 / machine.chip.dcn))


# -------------------------------------------------------------------------------------------------------- The compiler


def _given_up(machine):
    mesh = sharding.make_mesh(2, 2, 2, devices=machine.devices)
    table = {"embed": {"weight": jax.ShapeDtypeStruct((112, 32), jnp.float32)}}
    places = sharding.stored(mesh, table)
    tokens = sharding.batch_shapes({"t": jax.ShapeDtypeStruct((16, 20), jnp.int32)}, mesh)["t"]

    def total(table, tokens):
        x = jnp.take(sharding.gather(table)["embed"]["weight"], tokens, axis=0)
        return jnp.sum(sharding.shard(x, "BSD") ** 2)

    function = jax.jit(jax.grad(total), out_shardings=places)
    table = sharding.placed(table, places)
    traced = program.Traced("step", function, (table, tokens), {}, {"weights": table, "inputs": tokens})
    return program.measured(None, mesh, machine, traced)


def test_a_split_that_the_partitioner_gives_up_is_a_failure():
    found = _given_up(topology.find("cpu:8"))
    assert len(found["given_up"]) == 1 and "f32[4,20,32]" in found["given_up"][0]
    assert "FAILURE: the partitioner gives up a split" in "\n".join(fit._program_lines(found))


@TPU
def test_libtpu_says_so_as_well():
    # In a process of its own: what libtpu says is settled as jax first looks for a TPU.
    code = "import json, test_fit as t; print(json.dumps(t._given_up(t.topology.find('v5e:2x4'))['given_up']))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (told,) = json.loads(done.stdout)
    assert "f32[4,20,32]" in told


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM: program (32.5G) exceeds available HBM (15.75G)", 32.5 * GIB),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 32.5GiB of 15.75GiB hbm. Exceeded by 16.75GiB",
            32.5 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 130M of 128M", None),
        ("RESOURCE_EXHAUSTED: the program exceeds HBM", 0.0),
        ("INTERNAL: hbm 3.0G", None),
    ],
)
def test_what_a_program_wants_is_read_in_every_wording(message, size):
    assert program.refused_bytes(message) == size


def test_the_memory_is_kept_where_the_programs_text_cannot_be_made(monkeypatch):
    def fails(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3")

    monkeypatch.setattr(hlo, "parse", fails)
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    traced = program.Traced("step", jax.jit(jnp.sin), (x,), {}, {"weights": x})
    machine = topology.find("cpu:1")
    step = program.measured(None, sharding.make_mesh(devices=machine.devices), machine, traced)
    assert step["fits"] and step["hbm"]["weights"] == 64 and "traffic" not in step
    text = "\n".join(fit._program_lines(step))
    assert "fits" in text and "cannot be read: INTERNAL: async-update instruction should have 1 operands" in text


class Refused:
    """A program that the compiler refuses with a message."""

    def __init__(self, message: str):
        self.message = message

    def trace(self, x):
        self.jaxpr = jax.make_jaxpr(jnp.sin)(x)
        return self

    def lower(self):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "total", "fault", "verdict"),
    [
        (
            "RESOURCE_EXHAUSTED: out of memory in HBM. Used 2.0G",
            3 * GIB,
            False,
            "DOES NOT FIT: train's step takes most, 3.00 GiB of",
        ),
        (
            "RESOURCE_EXHAUSTED: the program exceeds HBM",
            2 * GIB,
            False,
            "DOES NOT FIT: train's step takes most, at least 2.00 GiB of",
        ),
        (
            "RESOURCE_EXHAUSTED: vmem: used 130M of 128M",
            1.5 * GIB,
            True,
            "DOES NOT COMPILE: train's step: RESOURCE_EXHAUSTED: vmem",
        ),
        ("INTERNAL: a fault\nat 0x0", 1.5 * GIB, True, "DOES NOT COMPILE: train's step: INTERNAL: a fault"),
    ],
)
def test_a_program_that_the_compiler_refuses_keeps_its_memory(message, total, fault, verdict):
    """Half a GiB is its argument, one waits; the chip has two."""
    argument, waits = (jax.ShapeDtypeStruct((n * 2**27,), jnp.float32) for n in (1, 2))
    machine = topology.Topology("v5e:1x1", [], topology.CHIPS["v5e"]._replace(hbm=2 * GIB))
    traced = program.Traced(
        "step", Refused(message), (argument,), {}, {"weights": argument, "optimizer": waits}, ("optimizer",)
    )
    step = program.measured(None, sharding.make_mesh(devices=jax.devices()[:1]), machine, traced)
    hbm = step["hbm"]
    assert not step["fits"] and (hbm["weights"], hbm["optimizer"], hbm["total"]) == (GIB / 2, GIB, total)
    assert hbm.get("temporaries") == (1.5 * GIB if "Used 2" in message else None)
    assert fit._faulty(step) == fault
    found = {"fits": False, "stages": [{"stage": "train", "programs": [step]}]}
    assert fit.verdict(found).startswith(verdict) and "\n" not in fit.verdict(found)
    text = "\n".join(fit._program_lines(step))
    assert "refuses it: " + message.splitlines()[0] in text or "Used 2" in message
    assert ("DOES NOT COMPILE" if fault else "DOES NOT FIT") in text


def test_nothing_smaller_is_looked_for_where_memory_is_not_what_lacks(stubbed, monkeypatch):
    real = program.measured
    monkeypatch.setattr(program, "measured", lambda *a: {**real(*a), "fits": False, "refused": "INTERNAL: a fault"})
    found = _report(monkeypatch, 1e3)
    assert "remedy" not in found["stages"][0] and len(stubbed) == 1 and not found["fits"]


@TPU
def test_what_does_not_fit_is_measured_all_the_same():
    machine = topology.find("v5e:1x1")
    mesh = sharding.make_mesh(devices=machine.devices)
    x = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32, sharding=sharding.replicated(mesh))  # 16 GiB
    traced = program.Traced("step", jax.jit(lambda x: jnp.sin(x) @ x), (x,), {}, {"weights": x})
    found = program.measured(None, mesh, machine, traced)
    assert not found["fits"] and found["hbm"]["total"] >= 32 * GIB and found["hbm"]["weights"] == 16 * GIB
    assert found["hbm"]["limit"] == 15.75 * GIB and found["flops"] == 2 * 2.0**48


@TPU
def test_the_compilers_limit_is_the_one_in_the_table():
    for kind in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
        machine = topology.find(f"{kind}:{'1x1x1' if kind in ('v4', 'v5p', 'tpu7x') else '1x1'}")
        mesh = sharding.make_mesh(devices=machine.devices)
        x = jax.ShapeDtypeStruct((2**18, 2**18), jnp.float32, sharding=sharding.replicated(mesh))
        with sharding.use(mesh), pytest.raises(jax.errors.JaxRuntimeError) as raised:
            jax.jit(jnp.sin).lower(x).compile()
        amounts = sorted(float(n) for n, unit in program.AMOUNT.findall(str(raised.value)[:1000]) if unit == "G")
        assert amounts[-1] >= 256 and abs(amounts[-2] - machine.chip.hbm / GIB) < 0.015  # two digits, rounded or cut


@TPU
@pytest.mark.slow
def test_a_tiny_recipe_on_a_tpu():
    sft = fit.report(tiny(), "v5e:2x4")["stages"][0]["programs"][0]
    assert sft["fits"] and 0 < sft["mfu"]["serial"] < sft["mfu"]["overlapped"] < 1
    rl = tiny(
        source="rollouts",
        objective={"name": "policy_gradient.reinforce"},
        rollouts=dict(SAMPLING),
    )
    programs = fit.report(rl, "v5e:2x4")["stages"][0]["programs"]
    by_name = {program["program"]: program for program in programs}
    assert list(by_name) == ["step", "prepare", "prefill", "decode"]
    assert by_name["decode"]["tokens_per_second"]["serial"] > 0 and "mfu" not in by_name["decode"]
    for sampler in (by_name["prefill"], by_name["decode"]):
        assert sampler["hbm"]["total"] >= sampler["hbm"]["weights"] + sampler["hbm"]["optimizer"]


# --------------------------------------------------------------------------------------------------------- The recipes


@TPU
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: Path(p).name)
def test_a_tpu_recipe_is_checked_and_its_state_fits(path):
    config = recipe.opened(path)
    machine = topology.find(config.topology)
    mesh = sharding.make_mesh(**config.mesh, devices=machine.devices)
    ((_, settings),) = recipe.stages(config)
    assert program.prepared(settings, mesh).state_bytes() < machine.chip.hbm
    for axis in range(3):  # no axis of the mesh over all three of a torus, which would be gathered by summing
        line = [x for i, x in np.ndenumerate(mesh.devices) if all(n == 0 for a, n in enumerate(i) if a != axis)]
        assert topology.torus_axes(line) < 3


def test_a_recipe_with_a_table_names_the_nearest_of_its_lines():
    for name, argument in (("sft", "lama31_8b"), ("dpo", "llama31_70b")):  # SFT's alone has the larger one
        with pytest.raises(UserError, match=rf"no ARGUMENT '{argument}'. Did you mean 'llama31_8b'\?"):
            recipe.opened(f"{FOLDER / name}.py:{argument}")
    with pytest.raises(UserError, match="no ARGUMENT ''. Known: gemma3_12b, gemma3_12b,lora, .*, qwen3_8b,lora"):
        recipe.opened(f"{FOLDER / 'sft.py'}")


@pytest.mark.parametrize("argument", ["qwen3_8b", "llama31_8b,lora"])
def test_reinforcement_has_its_settings_from_one_recipe_and_its_model_from_another(argument):
    sft, own = recipe.opened(f"{FOLDER / 'sft.py'}:{argument}"), recipe.opened(f"{FOLDER / 'grpo.py'}:{argument}")
    grpo = recipe.opened(str(FOLDER.parent / "grpo.py"))
    assert all(own[k] == sft[k] for k in ("adapter", "dtype", "remat"))
    assert own.model == {"qwen3_8b": sft.model}.get(argument, f"{sft.model}-Instruct")
    assert all(own[k] == grpo[k] for k in ("objective", "source", "task", "steps", "batch_size", "best", "eval_every"))
    assert own.rollouts.group == grpo.rollouts.group and own.rollouts.prompt_window + own.rollouts.new == 1536


@pytest.mark.parametrize("argument", ["qwen3_8b", "qwen3_8b,lora"])
def test_a_second_method_has_what_the_first_says_of_the_model(argument, tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "tpu")  # wherever they lie, it is the one beside it, and not this clone's
    (tmp_path / "tpu" / "sft.py").write_text((FOLDER / "sft.py").read_text().replace("log_every=10", "log_every=7"))
    monkeypatch.chdir(tmp_path)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    values(["", f"--config=tpu/dpo.py:{argument}"])  # the command line's own way of reading a file
    sft, dpo = recipe.opened(f"tpu/sft.py:{argument}").to_dict(), recipe.opened(f"tpu/dpo.py:{argument}").to_dict()
    assert values.config.to_dict() == dpo
    own = {k for k in dpo if dpo[k] != sft[k]} - {"batch_size", "microbatches", "topology"}
    assert own == {"objective", "window", "epochs", "optimizer", "mesh"}
    assert sft["log_every"] == 7 and (dpo["window"], dpo["optimizer"]["lr"]) == (4096, 5e-6 if "lora" in argument else 5e-7)
    assert (dpo["model"], dpo["remat"], bool(dpo["adapter"])) == ("Qwen/Qwen3-8B-Base", "full", "lora" in argument)
