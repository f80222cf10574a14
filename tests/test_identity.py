"""What an artefact's digest holds: whatever decides its content makes another one when it changes, and nothing else does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
from safetensors.numpy import save_file
from test_generate import stand_in  # noqa: F401
from test_synthesis import settings as of_synthesis

import jaxpost
from jaxpost import recipe
from jaxpost.models import loading
from jaxpost.models.identity import identity
from jaxpost.sampling import processors
from jaxpost.storage.artefacts import key
from jaxpost.tasks import arithmetic

CONFIG = runs.MODEL | {"vocab_size": 32}
MINE = """
import dataclasses

import flax.struct
import jax.numpy as jnp

from jaxpost.declare import adapter
from jaxpost.types import Head, Output


@dataclasses.dataclass(frozen=True)
class Bag:
    vocab: int = 32
    width: int = 8
    max_positions: int = 64
    dtype = jnp.float32

    def init(self, key):
        return {"embed": {"weight": jnp.ones((self.vocab, self.width))}}

    def forward(self, params, batch, cache=None, *, tap=(), patch=None):
        return Output(params["embed"]["weight"][batch["tokens"]], Head(params["embed"]["weight"]))


def make(*, width: int = 8):
    return Bag(width=width)


def mix(one, two, *, share: float = 0.5):
    return share * one + (1 - share) * two


def steer(x, batch):
    return x + 1.0


@adapter(adds=("prefix/vectors",), neutral=False)
def mine(params, key, *, length: int = 2):
    return params


def never(logits, context):
    return logits
"""


def folder(place: Path, seed: int = 0) -> str:
    """A model's folder, whose weights are read by nobody."""
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(CONFIG))
    save_file({"x": np.random.default_rng(seed).normal(size=5)}, place / "model.safetensors")
    return str(place)


def prompt(place: Path, seed: int = 0) -> str:
    """A folder of peft's with a soft prompt."""
    place.mkdir(exist_ok=True)
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}))
    values = np.random.default_rng(seed).normal(size=(2, 32)).astype(np.float32)
    save_file({"prompt_embeddings": values}, place / "adapter_model.safetensors")
    return str(place)


def digest(model, adapter=None, seed: int = 0) -> str:
    return key(identity(loading.describe(model, adapter=adapter, text=False), seed))


def edit(file: Path, old: str, new: str) -> None:
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return folder(tmp_path / "a"), folder(tmp_path / "b", 1), f"{tmp_path}/mine.py"


def test_a_model_of_models_is_made_of_their_weights_and_of_the_functions_sources(parts, tmp_path):
    one, two, file = parts
    models = {
        "fused": {"name": "fused", "of": [one, two], "mix": f"{file}:mix"},
        "shared": {"name": "fused", "of": [one, two], "mix": {"name": f"{file}:mix", "share": 0.25}},
        "patched": {"name": "patched", "of": one, "patch": {"layers.0.mlp_out": f"{file}:steer"}},
        "made": {"name": f"{file}:make"},
    }

    def changed(before: dict) -> set[str]:
        now = {name: digest(model) for name, model in models.items()}
        names = {name for name in models if before.get(name) != now[name]}
        before |= now
        return names

    seen: dict[str, str] = {}
    assert changed(seen) == set(models) and not changed(seen) and len(set(seen.values())) == 4
    edit(Path(file), "import dataclasses", "# A note.\nimport dataclasses")
    assert not changed(seen)
    for old, new, names in (
        ("share * one + (1 - share)", "share * one - (1 - share)", {"fused", "shared"}),
        ("return x + 1.0", "return x + 2.0", {"patched"}),
        ("return Bag(width=width)", "return Bag(width=2 * width)", {"made"}),
        ('Head(params["embed"]["weight"])', 'Head(2 * params["embed"]["weight"])', {"made"}),  # the class, not its maker
    ):
        edit(Path(file), old, new)
        assert changed(seen) == names
    folder(tmp_path / "b", 2)
    assert changed(seen) == {"fused", "shared"}
    folder(tmp_path / "a", 3)
    assert changed(seen) == {"fused", "shared", "patched"}


def test_adapters_are_told_by_their_files_sources_and_what_their_seed_draws(parts, tmp_path):
    one, _, file = parts
    peft = {"name": "peft", "folder": prompt(tmp_path / "p")}
    before = digest(one, peft)
    assert before == digest(one, peft) != digest(one)
    prompt(tmp_path / "p", 1)
    assert digest(one, peft) != before
    # A fresh prompt is drawn by the seed, and shows at once; LoRA's factors are drawn, and change nothing before they learn.
    for entry, shows in (({"name": "prompts.soft"}, True), ({"name": "prompts.prefix"}, True), ({"name": "lora"}, False)):
        assert (digest(one, entry, seed=1) != digest(one, entry, seed=2)) is shows
    own = {"name": f"{file}:mine"}
    before = digest(one, own)
    edit(Path(file), "    return params\n", "    return dict(params)\n")
    assert digest(one, own) != before


def chained(entries, new: int = 8) -> list:
    tokenizer = arithmetic.tokenizer()
    return processors.chain(entries, processors.About(tokenizer, (tokenizer.eos_token_id,), 32, new), "p")


@pytest.mark.parametrize("name", ["constrained.trie", "constrained.substring"])
def test_processors_are_told_by_tables_sources_and_keywords(parts, tmp_path, name):
    file, own = tmp_path / "titles.txt", f"{parts[-1]}:never"
    digests = [processors.identity(chained([]))]
    for texts in ("12\n34\n", "12\n35\n"):
        file.write_text(texts)
        digests += [processors.identity(chained([{"name": name, "texts": str(file)}])) for _ in range(2)]
    assert digests[1] == digests[2] != digests[3] == digests[4] and digests[0] == {}
    banned = [processors.identity(chained([{"name": "banned", "tokens": [i]}])) for i in (1, 1, 2)]
    assert banned[0] == banned[1] != banned[2]
    before = processors.identity(chained([own]))
    edit(Path(parts[-1]), "    return logits\n", "    return 2 * logits\n")
    assert processors.identity(chained([own])) != before


SCRIPT = """
import json, sys
from test_identity import chained, digest, processors
model, adapter, entries = json.loads(sys.argv[1])
print(digest(model, adapter), json.dumps(processors.identity(chained(entries))))
"""


def test_another_process_gives_the_same_digest(parts, tmp_path):
    one, two, file = parts
    (tmp_path / "titles.txt").write_text("12\n34\n")
    asked = [
        {"name": f"{file}:make"},
        None,
        [{"name": "constrained.trie", "texts": f"{tmp_path}/titles.txt"}, {"name": "banned", "tokens": [1]}, f"{file}:never"],
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'tests'}"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(asked)]
    other = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert other.stdout.strip() == f"{digest(*asked[:2])} {json.dumps(processors.identity(chained(asked[2])))}", other.stderr


def test_rows_are_made_again_when_a_table_or_a_processor_has_changed(tmp_path, stand_in, monkeypatch):  # noqa: F811
    monkeypatch.setattr(loading, "weights", lambda *_: None)
    file, mine = tmp_path / "titles.txt", tmp_path / "mine.py"
    mine.write_text("def never(logits, context):\n    return logits\n")
    chain = [{"name": "constrained.trie", "texts": str(file)}, f"{mine}:never"]
    drawn = {"group": 2, "prompt_window": 12, "new": 4, "processors": chain}
    prompted = of_synthesis(tmp_path, rollouts=drawn)
    judged = {"do": "generate", "rows": "scored", "task": {"name": "arithmetic", "examples": 4}, "rollouts": drawn}
    for config in (prompted, {**prompted, "drawn": judged}):
        counts, place = [], tmp_path / str(len(config["drawn"]))
        for texts, body in (("12\n", "logits"), ("12\n", "logits"), ("34\n", "logits"), ("34\n", "logits + 0")):
            file.write_text(texts)
            mine.write_text(f"def never(logits, context):\n    return {body}\n")
            jaxpost.train(recipe.make(**config), place)
            counts.append(len(list((place / "rows").iterdir())))
        assert counts == [1, 1, 2, 3]
