"""Writes the golden values that tests/test_encoders.py holds the encoders to, computed by `transformers`.

    pip install torch transformers safetensors
    python tests/golden/make_encoders.py

encoders.npz: `<case>` of tests/encoder_cases.py, and of its WHOLE decoders, the logits [24 + 9, V] float32 of its two rows one
after the other, with their token types where the family has them; `<case>/hidden` of BARE encoders, the last hidden states
[24, D] of the first row. A checkpoint that transformers would not load whole, or would leave a tensor of, stops the run. So
does a folder that transformers writes of it and that jaxpost does not open with the same logits.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import encoder_cases as cases
import family_cases
from test_encoders import logits_of

from jaxpost import sharding
from jaxpost.models import loading

HERE = Path(__file__).parent


def computed(folder: Path, name: str) -> np.ndarray:
    """The logits of a case's folder."""
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {k: v for k, v in info.items() if v and k != "error_msgs"}
    assert not wrong, f"{name}: {wrong}"
    rows = zip(cases.tokens(name), cases.types(name), strict=True)
    logits = []
    with torch.no_grad():
        for tokens, types in rows:
            more = {"token_type_ids": torch.from_numpy(types[None]).long()} if name.startswith("bert/") else {}
            logits.append(model.eval()(torch.from_numpy(tokens[None]).long(), **more).logits[0].numpy())
    logits = np.concatenate(logits)
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        spec, params = loading.open_model(again, sharding.make_mesh(devices=jax.devices()[:1]))
        gap = np.abs(logits_of(spec.transformer, params, name) - logits).max()
        assert gap <= 1e-5 * np.abs(logits).max(), f"{name}: as transformers writes it, {gap}"
    return logits


def bare(folder: Path, name: str) -> np.ndarray:
    """The last hidden states of a case's first row, written without a head."""
    cases.write_bare(folder, name)
    options = {"add_pooling_layer": False} if name.startswith("bert/") else {}
    model, info = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    wrong = {k: v for k, v in info.items() if v and k != "error_msgs"}
    assert not wrong, f"{name}: {wrong}"
    with torch.no_grad():
        return model(torch.from_numpy(cases.tokens(name)[0][None]).long()).last_hidden_state[0].numpy()


def whole(folder: Path, name: str) -> np.ndarray:
    """The logits of a decoder's case whose tokens see the whole document."""
    cases.write_whole(folder, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(x[None]).long()).logits[0].numpy() for x in family_cases.tokens(name)])


def main() -> None:
    values = {}
    for name in cases.NAMES:
        with tempfile.TemporaryDirectory() as folder:
            cases.write(Path(folder), name)
            values[name] = computed(Path(folder), name)
            print(name, np.abs(values[name]).max())
    for name in cases.BARE:
        with tempfile.TemporaryDirectory() as folder:
            values[f"{name}/hidden"] = bare(Path(folder), name)
    for name in cases.WHOLE:
        with tempfile.TemporaryDirectory() as folder:
            values[name] = whole(Path(folder), name)
    np.savez_compressed(HERE / "encoders.npz", **values)


if __name__ == "__main__":
    main()
