"""configs/papers/half_percent.py: what is chosen is of the target, and the shares of formats are those that it states."""

from collections import Counter
from pathlib import Path

import numpy as np

from jaxpost.config import resolve

PAPER = str(Path(__file__).parent.parent / "configs" / "papers" / "half_percent.py")
paper = resolve.find(f"{PAPER}:get_config", "configs").__globals__


def test_what_is_chosen_is_of_the_target_and_the_core_set_covers_it():
    rows = [{"category": paper["TARGET"] if i % 2 else "order"} for i in range(40)]
    vectors = np.eye(4)[[0 if i < 34 else i % 4 for i in range(40)]] + 0.001 * np.arange(40)[:, None]
    core = paper["core"](rows, {"v": vectors}, 5, column="v", keep=2)
    assert all(rows[i]["category"] == paper["TARGET"] for i in core)
    assert len(set(vectors[core].argmax(1))) == 2, "rare directions too"
    drawn = paper["random"](rows, {}, 5, keep=10)
    assert len(set(drawn)) == 10 and all(rows[i]["category"] == paper["TARGET"] for i in drawn)


def test_formats_have_the_shares_that_are_stated():
    task = paper["make"]()
    formats = Counter(task.conversation(i)["format"] for i in range(2000))
    shares = np.array([4.0**-n for n in range(4)]) / sum(4.0**-n for n in range(4))
    for name, share in zip(paper["FORMATS"], shares, strict=True):
        assert abs(formats[name] / 2000 - share) < 4 * np.sqrt(share * (1 - share) / 2000), name
