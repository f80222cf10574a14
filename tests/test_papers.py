"""The papers of configs/papers: every study is checked, and its committed results belong to it."""

import re
from pathlib import Path

import jax
import pytest

from jaxpost import recipe, sharding, train
from jaxpost.config import resolve
from jaxpost.models import families, hf
from jaxpost.models.transformer import Transformer
from jaxpost.stages import plan
from jaxpost.studies import results
from jaxpost.tokenizer import save

FOLDER = Path(__file__).parent.parent / "configs" / "papers"
PAPERS = [Path(file) for file in results.studies(FOLDER)]


def test_the_table_is_the_one_that_the_results_give():
    assert (FOLDER / "README.md").read_text() == results.gallery(FOLDER), "python -m jaxpost.study --table writes it"


@pytest.mark.parametrize("file", PAPERS, ids=lambda file: file.stem)
def test_results_belong_to_their_claims(file):
    if results.path_of(file).exists():
        assert not results.check(str(file))


@pytest.mark.parametrize("file", PAPERS, ids=lambda file: file.stem)
def test_a_paper_is_short_and_its_arms_are_recipes(file):
    assert len(file.read_text().splitlines()) <= 120
    study = results.study_of(str(file))
    arms = results.recipes(str(file), study)
    assert study.family and study.claims and len(arms) > 1
    for config in arms.values():
        recipe.stages(config)


def test_the_paper_that_the_page_writes_out_is_a_study(tmp_path):
    page = (FOLDER.parent.parent / "docs" / "papers.md").read_text()
    file = tmp_path / "batch.py"
    file.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    study = results.study_of(str(file))
    arms = results.recipes(str(file), study)
    assert list(arms) == ["small", "large"] and {config.steps * config.batch_size for config in arms.values()} == {4800}
    for config in arms.values():
        (_, settings), *_ = recipe.stages(config)
        plan.plan_stage("train", settings, sharding.make_mesh(devices=jax.devices()[:1]))


ARMS = [(file, arm) for file in PAPERS for arm in results.study_of(str(file)).arms]


def stand_in(folder: Path):
    """path, config -> the folder of an untrained model in place of a recipe's, with that recipe's tokenizer."""

    def made(path: str, config) -> str:
        of = recipe.opened(path.replace("{seed}", str(config.seed)))
        if isinstance(of.model, str):
            return made(of.model.removeprefix("recipe:"), config)
        fields = {**of.model.to_dict(), "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        if not folder.exists():
            arch = families.architecture(fields)
            hf.save(folder, Transformer(arch).init(jax.random.PRNGKey(0)), arch, fields)
            save(resolve.find(f"jaxpost.{of.tokenizer}", "tokenizers")(), folder)
        return str(folder)

    return made


@pytest.mark.slow
@pytest.mark.parametrize(("file", "arm"), ARMS, ids=[f"{file.stem}-{arm}" for file, arm in ARMS])
def test_two_steps_of_an_arm(file, arm, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_of_recipe", stand_in(tmp_path / "model"))
    config = results.recipes(str(file), results.study_of(str(file)))[arm]
    with config.unlocked(), config.ignore_type():
        for settings in (config, *(config[name] for name in config.stages)):
            if settings.get("do", "train") == "train" and not (settings is config and config.stages):
                settings.steps, settings.tokens, settings.optimizer.warmup = 2, 0, 0
                if settings.get("task") or config.task:
                    settings.eval_per_cell = 1
            if getattr(settings.get("task"), "examples", 0):
                settings.task.examples = 600
            for entry in settings.get("evals", {}).values():
                entry.per_cell = 1
    figures = train.run(config, tmp_path / "run")
    assert results.study_of(str(file)).metric in figures
