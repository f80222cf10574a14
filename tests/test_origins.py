"""A function that only a file names is not run."""

import ast
import contextlib
import functools
import json
import subprocess
import sys

import jax.numpy as jnp
import pytest
import runs

import jaxpost
from jaxpost.annotate import annotate
from jaxpost.config import resolve
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.storage import checkpoint
from jaxpost.types import TrainState


def state() -> TrainState:
    params, count = {"a": jnp.ones((4, 2))}, jnp.asarray(1)
    return TrainState(count, params, {"a": None}, {"mu": params}, None, jnp.ones(2), count, count)


HOSTILE = (
    "FILE:run",
    "os.system",
    "builtins.exec",
    "antigravity.run",
    "lora.jax.jit",
    "objectives.sft.nll",
    "lora.leaf",
    None,
    7,
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_function_that_only_a_checkpoint_names_is_not_imported(tmp_path, name):
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\ndef run(params, key):\n    return params\n")
    name = name.replace("FILE", str(trap)) if isinstance(name, str) else name
    folder = tmp_path / "checkpoints" / "train"
    saved, before = checkpoint.Checkpoints(folder), set(sys.modules)
    saved.save(state(), {"adapter": {"name": name}})
    saved.manager.wait_until_finished()
    for read in (lambda: saved.meta(1), lambda: checkpoint.read_meta(folder / "1"), lambda: loading.carried(folder / "1")):
        with pytest.raises(UserError, match="meta/metadata: names"):
            read()
    saved.close()
    assert not (tmp_path / "sprung").exists() and "antigravity" not in set(sys.modules) - before


def test_a_checkpoint_may_name_what_the_user_names_and_what_is_jaxposts(tmp_path, monkeypatch):
    monkeypatch.setattr(resolve, "_TRUSTED", set())
    own = f"{tmp_path}/mine.py:adapter"
    for step, name in enumerate(("lora.lora", "lora.rslora", own)):
        (tmp_path / str(step) / "meta").mkdir(parents=True)
        (tmp_path / str(step) / "meta" / "metadata").write_text(json.dumps({"adapter": {"name": name}}))
    assert loading.carried(tmp_path / "0") == {"name": "lora.lora"}
    assert loading.carried(tmp_path / "1") == {"name": "lora.rslora"}
    with pytest.raises(UserError, match=f"--trust={own}"):
        loading.carried(tmp_path / "2")
    with pytest.raises(UserError, match="no such folder"):
        loading.describe(str(tmp_path / "none"), adapter={"name": own})
    assert loading.carried(tmp_path / "2") == {"name": own}


MAKE = """
from jaxpost.models.loading import describe


def make(*, width: int = 16):
    fields = {"model_type": "llama", "vocab_size": 32, "hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 1}
    return describe({**fields, "num_attention_heads": 2}, text=False).transformer
"""


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """(a folder as a run leaves it, whose model a function of the user's makes; that function), which nobody has named."""
    (tmp_path / "mine.py").write_text(MAKE)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text(json.dumps({"name": f"{tmp_path}/mine.py:make"}))
    monkeypatch.setattr(resolve, "_TRUSTED", set())
    return str(tmp_path / "w"), f"{tmp_path}/mine.py:make"


def refused(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    return str(error.value)


def test_in_python_a_function_of_the_users_is_named_where_its_model_is_opened(workdir, tmp_path, monkeypatch):
    where, own = workdir
    changes = {"model": where, "tokenizer": "tasks.arithmetic.tokenizer", "data": str(tmp_path / "none.jsonl"), "window": 16}
    for call in (
        functools.partial(jaxpost.load, where),
        functools.partial(jaxpost.train, None, tmp_path / "r", **changes),
        functools.partial(annotate, None, "logps", out=str(tmp_path / "c"), **changes),
    ):
        monkeypatch.setattr(resolve, "_TRUSTED", set())
        assert f"--trust={own}, or from Python trust=['{own}']" in refused(call)
        with contextlib.suppress(UserError):  # what comes after the model: no weights, or no data
            call(trust=own)
            raise AssertionError("there is nothing to open")
        assert own in resolve._TRUSTED


COMMANDS = ("train", "annotate", "generate", "evaluate", "export", "merge", "fit")


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_that_opens_a_model_takes_trust(module):
    tree = ast.parse((runs.ROOT / "jaxpost" / f"{module}.py").read_text())
    (call,) = [x for x in ast.walk(tree) if isinstance(x, ast.Call) and ast.unparse(x.func) == "cli.run"]
    assert {"config", "model"} & {keyword.arg for keyword in call.keywords}


@pytest.mark.parametrize("trusted", [False, True])
def test_a_run_takes_trust_from_its_command(workdir, tmp_path, trusted):
    where, own = workdir
    flags = ["--config=configs/sft.py", f"--workdir={tmp_path}/r", f"--config.model={where}", "--config.data=none.jsonl"]
    flags += ["--config.tokenizer=tasks.arithmetic.tokenizer", *[f"--trust={own}"] * trusted]
    command = [sys.executable, "-m", "jaxpost.train", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runs.ROOT, timeout=120)
    assert done.returncode == 2 and ("a file does not decide what is run" in done.stderr) is not trusted
    assert ("no model.safetensors" in done.stderr) is trusted, done.stderr
