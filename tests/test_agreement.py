"""Processes that were given other settings, data, tokenizer, weights or functions stop before the first step, all of them.

What the other process sends is given here; tests/test_multiprocess.py has the case of two real ones.
"""

import dataclasses
import json
import types

import llama_cases
import pytest
import runs
from etils import epath

from jaxpost import recipe, sharding
from jaxpost.data import templates
from jaxpost.errors import UserError
from jaxpost.stages import agreement
from jaxpost.stages.plan import plan_stage


@pytest.fixture
def plans(tmp_path):
    """(settings) -> the plan of a run on a data file of its own name, as one host makes it."""
    mesh = sharding.make_mesh()

    def make(host: str, rows: int = 40, **changes):
        folder = tmp_path / host
        folder.mkdir(exist_ok=True)
        data = folder / "data.jsonl"
        data.write_text("".join(json.dumps({"text": f"{i}+{i}"}) + "\n" for i in range(rows)))
        (name, settings), *_ = recipe.stages(recipe.make(**runs.settings(folder, steps=1, data=str(data), **changes)))
        with sharding.use(mesh):
            return plan_stage(name, settings, mesh)

    return make


def disagreed(monkeypatch, one, other) -> str:
    """The message where another process has the plan `other`; "" where they agree."""
    monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding, "each_text", lambda text: [text, json.dumps({other.name: agreement.inputs(other)})])
    try:
        agreement.check_inputs([one])
    except UserError as error:
        return str(error)
    return ""


def test_equal_inputs_agree_wherever_they_lie(plans, monkeypatch):
    assert not disagreed(monkeypatch, plans("a"), plans("b"))


@pytest.mark.parametrize("kind", agreement._REMEDIES)
def test_each_kind_of_input_is_compared(plans, monkeypatch, tmp_path, kind):
    one, other = plans("a"), plans("b", rows=41 if kind == "data" else 40)
    if kind == "task":
        other = other._replace(problems=other.problems | {"records": [{"prompt": "1"}]})
    if kind == "tokenizer":
        other.spec.tokenizer.chat_template = templates.TEMPLATES["chatml"]
    if kind == "weights":
        folders = [tmp_path / f"model-{number}" for number in range(2)]
        for folder in folders:
            folder.mkdir()
            llama_cases.write(folder, "grouped")
        content = (folders[1] / "model.safetensors").read_bytes()
        (folders[1] / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        pairs = zip((one, other), folders, strict=True)
        one, other = (p._replace(spec=dataclasses.replace(p.spec, folder=epath.Path(folder))) for p, folder in pairs)
    if kind == "functions":
        other = other._replace(objective=lambda forward, params, batch, key: ({}, {}))
    message = disagreed(monkeypatch, one, other)
    assert f"process 0 and process 1 have other {kind}; {agreement._REMEDIES[kind]}" in message


@pytest.mark.parametrize("kind", ["task", "functions"])
def test_what_a_stage_that_generates_reads_is_compared_too(plans, monkeypatch, kind):
    def generating(answer, reward):
        samples = types.SimpleNamespace(prompt=lambda i: {"prompt": f"{i}", "answer": answer}, rewards={"own": (reward, 1.0)})
        return types.SimpleNamespace(name="drawn", spec=plans("a").spec, samples=samples)

    one = generating("1", lambda record, text: 1.0)
    other = generating("2", lambda record, text: 1.0) if kind == "task" else generating("1", lambda record, text: 0.0)
    assert f"drawn: process 0 and process 1 have other {kind}" in disagreed(monkeypatch, one, other)
    assert not disagreed(monkeypatch, one, generating("1", lambda record, text: 1.0))


def test_other_settings_are_named_even_those_that_change_nothing_learned(monkeypatch):
    monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
    other = recipe.make(seed=1, log_every=3).to_json()
    monkeypatch.setattr(sharding, "each_text", lambda text: [text, other])
    with pytest.raises(UserError, match=r"process 0 and process 1 .*\n  log_every: .* -> 3\n  seed: 0 -> 1\n.*same command"):
        agreement.check_settings(recipe.make(seed=0, log_every=10))
