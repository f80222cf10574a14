"""Writes the golden values that tests/test_families.py holds every family to, computed by `transformers`.

    pip install torch transformers safetensors
    python tests/golden/make_families.py

families.npz, for each case of tests/family_cases.py: `<case>/logits`, float32, of its two rows one after the other,
[24 + 9, V]; `<case>/greedy`, int32, the 32 tokens that follow its first five. A checkpoint that transformers would not load
whole, or would leave a tensor of, stops the run. So does a folder that transformers writes of it, in either of its forms, that
jaxpost does not open as it lies there with the same logits within 1e-4 of the largest.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import family_cases as cases
from test_llama import batch_of, joined, scores

from jaxpost import sharding
from jaxpost.models import loading

HERE = Path(__file__).parent


def reread(model, name: str, wanted: np.ndarray) -> None:
    """Holds jaxpost to the folders that transformers writes of a model: as on the hub, and with all experts in one tensor."""
    rows = cases.tokens(name)
    for original in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, save_original_format=original)
            written = load_file(Path(folder) / "model.safetensors")
            own = cases.weights(name) if original or "num_experts_per_tok" not in cases.config(name) else cases.stacked(name)
            assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in own.items()}, name
            found, params = loading.open_model(folder, sharding.make_mesh(devices=jax.devices()[:1]))
            got = joined(scores(found.transformer, params, batch_of(rows, cases.LENGTHS[0])), rows)
            assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max(), f"{name}: as transformers writes it"


def computed(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(logits, greedy tokens) of a case's folder."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    wrong = {k: v for k, v in info.items() if v and k != "error_msgs"}
    assert not wrong, f"{name}: {wrong}"
    rows = [torch.from_numpy(row[None]).long() for row in cases.tokens(name)]
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        logits = np.concatenate([model(row).logits[0].numpy() for row in rows])
        reread(model, name, logits)
        prompt = rows[0][:, : cases.PROMPT]
        follows = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=cases.NEW, do_sample=False)
    return logits, follows[0, cases.PROMPT :].numpy().astype(np.int32)


def main() -> None:
    found = {}
    for name in cases.NAMES:
        with tempfile.TemporaryDirectory() as folder:
            cases.write(Path(folder), name)
            found[f"{name}/logits"], found[f"{name}/greedy"] = computed(Path(folder), name)
            assert len(found[f"{name}/greedy"]) == cases.NEW, name
            print(name, np.abs(found[f"{name}/logits"]).max())
    np.savez_compressed(HERE / "families.npz", **found)


if __name__ == "__main__":
    main()
