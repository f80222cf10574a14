"""Two processes of four devices each compute what one process of eight does: by jax.distributed, on the loopback interface.

Both run tests/worker.py on the mesh data 2 x fsdp 2 x tensor 2. Losses, metrics and gradients agree to 1e-5, the rounding
of float32 sums in another order; sampled tokens and the data's position are equal.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import worker

from jaxpost import sharding
from jaxpost.models import loading
from jaxpost.reporting import writers
from jaxpost.storage import checkpoint

ROUNDING = 1e-5
SECONDS = 240


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _work(folder: Path, part: str, processes: int) -> Path:
    """Runs that part of the worker in so many processes and waits for all; whatever happens, none of them is left behind."""
    folder.mkdir()
    here, port, children = Path(__file__).parent, str(_free_port()), []
    environment = os.environ | {"PYTHONPATH": str(here.parent), "JAX_PLATFORMS": "cpu"}
    # Many small programs that run for a moment: compiling them well would take most of the time.
    flags = f"--xla_force_host_platform_device_count={8 // processes} --xla_backend_optimization_level=0"
    environment["XLA_FLAGS"] = flags
    try:
        for number in range(processes):
            command = [sys.executable, str(here / "worker.py"), part, str(processes), str(number), port, str(folder)]
            with (folder / f"log-{number}.txt").open("w") as log:
                children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        for number, child in enumerate(children):
            code = child.wait(timeout=SECONDS)
            assert code == 0, (folder / f"log-{number}.txt").read_text()[-3000:]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder of one process, folder of two)."""
    root = tmp_path_factory.mktemp("processes")
    return _work(root / "one", "stages", 1), _work(root / "two", "stages", 2)


@pytest.mark.slow
def test_steps_agree_for_every_kind_of_objective(tmp_path):
    mesh = sharding.make_mesh(**worker.MESH)
    with sharding.use(mesh):
        one = worker.steps(mesh)
    two = json.loads((_work(tmp_path / "two", "steps", 2) / "steps.json").read_text())
    assert one.keys() == two.keys() and len(one) == 4
    for name, steps in one.items():
        for expected, found in zip(steps, two[name], strict=True):
            assert found["metrics"] == pytest.approx(expected["metrics"], rel=ROUNDING, abs=ROUNDING / 10), name
            for path, wanted in expected["gradients"].items():
                gap = np.linalg.norm(np.subtract(found["gradients"][path], wanted))
                assert gap <= ROUNDING * np.linalg.norm(wanted), (name, path)


@pytest.mark.slow
def test_rollouts_are_equal_and_each_completion_is_judged_once(folders):
    one = dict(np.load(folders[0] / "sampled-0.npz"))
    rest = [dict(np.load(folders[1] / f"sampled-{number}.npz")) for number in range(2)]
    judged, parts = one.pop("judged"), [part.pop("judged") for part in rest]
    # Three batches of 32; what evaluation asks of all comes on top, on every process.
    for number, part in enumerate(parts):
        assert (np.bincount(judged)[np.arange(32)] - np.bincount(part, minlength=32)[np.arange(32)]).tolist() == [
            0 if i % 2 == number else 3 for i in range(32)
        ]
    assert len(one) == 8
    for name, batch in one.items():
        # The tokens are the same, so the rewards are, and from them everything on the host follows bit for bit.
        np.testing.assert_array_equal(batch, np.concatenate([part[name] for part in rest]))
        assert name.startswith("advantages") or np.unique(batch, axis=0).shape[0] > 8


@pytest.mark.slow
def test_a_reward_that_fails_on_one_machine_stops_all(tmp_path):
    folder = _work(tmp_path / "two", "failing", 2)
    told = [(folder / f"told-{number}.txt").read_text() for number in range(2)]
    assert "another process's rewards failed" in told[0]
    assert "reward fails failed on 8 of 8 completions" in told[1] and "the disk of this machine is full" in told[1]


@pytest.mark.slow
def test_hosts_with_other_data_stop_before_the_first_step(tmp_path):
    folder = _work(tmp_path / "two", "unequal", 2)
    messages = {(folder / f"told-{number}.txt").read_text() for number in range(2)}
    assert len(messages) == 1 and "train: process 0 and process 1 have other data; copy" in messages.pop()
    assert not (folder / "run").exists()


def _figures(folder):
    """(row, its numbers without the times, nan where nothing was measured) of each logged row."""
    rows, none = writers.read_rows(folder / "run" / "metrics.jsonl"), float("nan")
    numbers = [{k: v for k, v in row.items() if k not in runs.TIMES and not isinstance(v, str)} for row in rows]
    return [(row, {k: none if v is None else v for k, v in own.items()}) for row, own in zip(rows, numbers, strict=True)]


@pytest.mark.slow
def test_logged_figures_agree_through_both_stages(folders):
    one, two = (_figures(folder) for folder in folders)
    assert [row["stage"] for row, _ in one] == [row["stage"] for row, _ in two]
    assert {row["stage"] for row, _ in one} == {"sft", "reinforce"} and len(one) >= 7
    for (_, expected), (_, found) in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING / 10, nan_ok=True)


@pytest.mark.slow
def test_what_two_processes_saved_one_restores(folders):
    mesh, found = sharding.make_mesh(2, 2, 2), []
    for folder in folders:
        saved = checkpoint.Checkpoints(folder / "run" / "checkpoints" / "sft")
        meta = saved.meta(saved.latest())
        saved.close()
        model = loading.describe(runs.MODEL)
        params = checkpoint.load_params(
            checkpoint.find_step(folder / "run" / "checkpoints" / "sft"), loading.abstract(model.transformer, mesh)
        )
        found.append((meta["position"], meta["num_tokens"], jax.device_get(params)))
    (*one, params), (*two, others) = found
    assert one == two and one[0] == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=ROUNDING * np.linalg.norm(a)), params, others)
