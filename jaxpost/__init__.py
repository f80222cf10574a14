"""jaxpost: post-training of language models in JAX.

    import jaxpost

    model = jaxpost.load("FOLDER")        a Hugging Face folder, or a workdir: .params, .forward, .logits, .generate (api.py)
    jaxpost.train(config, "WORKDIR")      the loop of `python -m jaxpost.train`, with functions for names (train.py)

Both are found on first use, so that `import jaxpost` loads no jax: a recipe, a flag or a launcher can import it in no time.
"""

import importlib

__all__ = ["load", "train"]


def __getattr__(name: str):
    if name == "load":
        return importlib.import_module("jaxpost.api").load
    if name == "train":  # the module itself, which can be called
        return importlib.import_module("jaxpost.train")
    raise AttributeError(f"module 'jaxpost' has no attribute {name!r}; from Python it has {', '.join(__all__)}.")
