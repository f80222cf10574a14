"""Whether all processes of a run were given the same: settings, data, tokenizer, weights, functions.

Each process reads its own files, and a copy of the data on one host may be older than on another. Such a run would train, on a
mixture that nobody chose. So every process sends a digest of what it read before the first step, and all stop where two differ.
"""

import itertools
import json

import jax

from jaxpost import recipe, sharding
from jaxpost.config.naming import digest_of
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.sources import parts
from jaxpost.storage import fingerprint

LOOK = 64  # how many of a task's problems are compared
_REMEDIES = {
    "data": "copy the same files (config.data, config.eval_data, config.annotations) to every host",
    "task": "copy the same task and its files (config.task) to every host",
    "tokenizer": "copy the same tokenizer (config.tokenizer or the model's folder) to every host",
    "weights": "copy the same model folder (config.model) to every host",
    "functions": "copy the same source (objective, reward) and the same jaxpost to every host",
}


def check_settings(config) -> None:
    """Raises UserError, on every process, where the settings differ between processes. All must call it."""
    if jax.process_count() == 1:
        return
    first, *rest = (json.loads(text) for text in sharding.each_text(config.to_json()))
    for number, other in enumerate(rest, start=1):
        if changes := recipe.difference(first, other, free=()):
            raise UserError(
                f"process 0 and process {number} were started with other settings:\n  "
                + "\n  ".join(changes)
                + "\nStart every process with the same command."
            )


def check_inputs(plans) -> None:
    """Raises UserError, on every process, where what they read for a stage differs, naming what. All must call it.

    plans: of all stages; those of stages that merge, select or evaluate are passed over, as the first process alone writes what
    they make.
    """
    plans = [plan for plan in plans if hasattr(plan, "samples") or hasattr(plan, "sets")]
    if jax.process_count() == 1:
        return
    digests = [json.loads(text) for text in sharding.each_text(json.dumps({plan.name: inputs(plan) for plan in plans}))]
    for number, other in enumerate(digests[1:], start=1):
        for plan, name in itertools.product(plans, _REMEDIES):
            if digests[0][plan.name][name] != other[plan.name][name]:
                raise UserError(
                    f"{plan.name}: process 0 and process {number} have other {name}; {_REMEDIES[name]}, or start from one "
                    "folder that all hosts see."
                )


def inputs(plan) -> dict[str, str]:
    """A digest of each kind of input that a stage read; plan: of one that trains, annotates or generates."""
    spec, samples = plan.spec, getattr(plan, "samples", None)
    problems = (None if samples else plan.problems) or {}
    sources = [samples] if samples else [getattr(source, "config", source) for source in parts(plan.source)]
    prompt = next((source.prompt for source in sources if hasattr(source, "prompt")), None)
    teachers = [loading.describe(name, text=False).folder for name in sorted(set(loading.others(spec).values()))]
    words = spec.tokenizer
    rewards = [reward for reward, _ in (samples.rewards if samples else problems.get("rewards", {})).values()]
    read = {
        "data": [] if samples else [plan.data, *(one.encoded.digest for one in plan.sets)],
        "task": ([prompt(i) for i in range(LOOK)] if prompt else []) + problems.get("records", [])[:LOOK],
        "tokenizer": [words.backend_tokenizer.to_str(), words.chat_template, words.special_tokens_map],
        "weights": [fingerprint.digest(folder) for folder in (spec.folder, *teachers) if folder is not None],
        "functions": rewards if samples else [plan.objective, *rewards],
    }
    return {name: digest_of(value) for name, value in read.items()}
