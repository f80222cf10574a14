"""A function that only a file names is not run."""

import json
import sys

import jax.numpy as jnp
import pytest

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
