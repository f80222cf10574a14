"""The notebooks run from top to bottom, offline, with the tiny stand-in that they fall back to."""

import contextlib
import io
import json
import math
from pathlib import Path

import pytest

from jaxpost.errors import UserError
from jaxpost.models import hub

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[str]:
    """The code of a notebook, cell by cell."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_committed_without_its_outputs(path):
    held = json.loads(path.read_text())
    code = [cell for cell in held["cells"] if cell["cell_type"] == "code"]
    assert held["nbformat"] == 4 and code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


def run(name: str, monkeypatch, folder: Path) -> tuple[dict, str]:
    """What a notebook's cells define and print, in a folder and without a network."""

    def unreachable(name, weights=False):
        raise UserError(f"{name}: no network")

    monkeypatch.setattr(hub, "fetch", unreachable)
    monkeypatch.chdir(folder)
    names, said = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(said):
        for source in cells(Path(__file__).parent.parent / "notebooks" / name):
            exec(compile(source, name, "exec"), names)  # the notebook's own code
    return names, said.getvalue()


@pytest.mark.slow
def test_preferences_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    names, _ = run("02_dpo.ipynb", monkeypatch, tmp_path)
    losses = [row["loss"] for row in names["figures"] if "rewards/margins" in row]
    assert abs(losses[0] - math.log(2)) < 1e-6 and losses[-1] < 0.6
    assert names["results"]["eval/rewards/accuracies"] == names["own"]["eval/rewards/accuracies"] == 1
    plain, excited = (sum(n for text, n in names["counts"]["after"].items() if text.endswith(end)) for end in ".!")
    assert plain > 24 and excited < 4, names["counts"]


@pytest.mark.slow
def test_fine_tuning_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    names, said = run("01_sft.ipynb", monkeypatch, tmp_path)
    losses = [row["loss"] for row in names["figures"] if "loss" in row]
    assert losses[-1] < 0.7 * losses[0], losses
    assert "Going on with a stand-in" in said and "What colour is grass? -> " in said
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "exported").iterdir()}
    assert names["results"]["eval/loss"] < losses[0] and (tmp_path / "runs" / "sft" / "report.html").exists()


@pytest.mark.slow
def test_a_reward_in_a_cell_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    names, said = run("03_grpo.ipynb", monkeypatch, tmp_path)
    rewards = [row["reward"] for row in names["figures"] if "frac_reward_zero_std" in row]
    # Half of what was imitated is right; at most 1 for the colour and 0.2 for one word.
    assert rewards[0] < 0.9 and 1.05 < rewards[-1] <= 1.2, rewards
    assert names["results"]["eval/accuracy"] > 0.8 and "advantage" in said
    right = {name: sum(n for text, n in counts.items() if "green" in text) for name, counts in names["counts"].items()}
    assert right["before"] < 24 < right["after"], names["counts"]
    assert names["long"]["eval/reward"] > 0.5  # two words and a half; what was imitated has one or two
    assert (tmp_path / "imitated" / "model.safetensors").exists() and (tmp_path / "runs" / "wordy" / "report.html").exists()
