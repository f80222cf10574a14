"""Writes the golden values that tests/test_llama.py holds jaxpost's Llama to, computed by `transformers`.

    pip install torch transformers safetensors
    python tests/golden/make_llama.py ../shared/models/stories260k

llama.npz: the float32 logits of each case of tests/llama_cases.py, its two rows one after the other, [40 + 17, V].
stories.json: the ids that greedy decoding makes of "Once upon a time" with the folder's weights; left as it is
where no folder is given.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import llama_cases

HERE = Path(__file__).parent


def logits(folder: Path, rows: list[np.ndarray]) -> np.ndarray:
    """The rows' logits one after the other, [sum of lengths, V] float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(row[None]).long()).logits[0].numpy() for row in rows])


def greedy(folder: Path, prompt: str, new: int) -> dict:
    """The prompt's ids and those of its greedy continuation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = model.generate(ids, max_new_tokens=new, do_sample=False)[0].tolist()
    return {"text": prompt, "prompt": ids[0].tolist(), "continuation": found[ids.shape[1] :]}


def main() -> None:
    found = {}
    for name in llama_cases.NAMES:
        with tempfile.TemporaryDirectory() as folder:
            llama_cases.write(Path(folder), name)
            found[name] = logits(Path(folder), llama_cases.tokens(name))
    np.savez_compressed(HERE / "llama.npz", **found)
    for folder in sys.argv[1:]:
        (HERE / "stories.json").write_text(json.dumps(greedy(Path(folder), "Once upon a time", 120)) + "\n")


if __name__ == "__main__":
    main()
