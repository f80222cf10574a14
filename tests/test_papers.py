"""The papers of configs/papers: every study is checked, and its committed results belong to it."""

from pathlib import Path

import pytest

from jaxpost import recipe
from jaxpost.studies import results

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
