"""What sentence-transformers reads beside a Hugging Face folder: its modules, and how a sentence is pooled."""

import json

from etils import epath

from jaxpost.models.families import Architecture

_MODULES = "sentence_transformers.models."
POOLINGS = {"last": "lasttoken", "mean": "mean_tokens"}  # which have a place there


def save(folder, arch: Architecture, *, pooling: str, normalise: bool) -> None:
    """Writes modules.json and its kin beside a model and its tokenizer. pooling: "last" or "mean", over all tokens."""
    folder = epath.Path(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *[("2_Normalize", "Normalize")] * normalise]
    modes = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    chosen = POOLINGS[pooling]
    pooled = {"word_embedding_dimension": arch.width, **{f"pooling_mode_{mode}": mode == chosen for mode in modes}}
    files = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": _MODULES + kind} for i, (path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": pooled | {"include_prompt": True},
        "sentence_bert_config.json": {"max_seq_length": arch.max_positions, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine" if normalise else "dot"},
    }
    for path, _ in modules:
        (folder / path).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
