"""`config.profile` leaves a trace of the steps that were asked for, and of no others."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from runs import MODEL

from jaxpost import recipe, train
from jaxpost.errors import UserError
from jaxpost.reporting.profile import Profile


def traced(folder) -> list[int]:
    """The numbers of the steps in the one trace below a folder."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted(int(e["args"]["step_num"]) for e in events if e.get("name") == "train" and "step_num" in e.get("args", {}))


def taken(profile: Profile, numbers: range) -> None:
    state, step = jnp.zeros(()), jax.jit(lambda x: x + 1)
    for number in numbers:
        with profile.step(number, state):
            state = step(state)
    profile.close(state)


def test_the_steps_after_the_first_two_are_traced(tmp_path):
    taken(Profile(3, tmp_path / "whole", at=5), range(6, 12))
    assert traced(tmp_path / "whole") == [8, 9, 10]
    taken(Profile(3, tmp_path / "cut", at=0), range(1, 5))  # a run that was asked to stop
    assert traced(tmp_path / "cut") == [3, 4]
    taken(Profile(0, tmp_path / "none", at=0), range(1, 5))
    assert not (tmp_path / "none").exists()


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i}+{i}"}) + "\n" for i in range(10, 80)))
    data = {"data": str(tmp_path / "texts.jsonl"), "tokenizer": "tasks.arithmetic.tokenizer"}
    return recipe.make(model=MODEL, window=16, batch_size=8, steps=4, profile=2, **data)


@pytest.mark.slow
def test_the_loop_traces_its_steps(settings, tmp_path, capfd):
    train.run(settings, tmp_path / "run")
    assert traced(tmp_path / "run" / "profile" / "train") == [3, 4]
    assert f"profile: {tmp_path / 'run' / 'profile' / 'train'}; open its" in capfd.readouterr().err


def test_more_steps_than_there_are_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match=r"config\.profile: tracing 4 steps takes 6, and there are 4"):
        train.run(settings, tmp_path / "run", profile=4)
    assert not (tmp_path / "run").exists()
