"""A run small enough to be started many times, and what is left of one: shared by the tests of the loop.

The recipe has every part of the loop that keeps state: a stage on demonstrations with a running mean and microbatches, a stage
on rollouts that starts from it, several steps a batch and a batch behind, a control that ends by the clock. Its task is a
user's own file, which borrows arithmetic and rewards what an untrained model already does now and then, so that reinforcement
has a gradient from the first step.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from jaxpost import optim, recipe, sharding
from jaxpost.config import links
from jaxpost.stages import train
from jaxpost.stages.plan import plan_stage
from jaxpost.storage import checkpoint

ROOT = Path(__file__).parent.parent
TIMES = {"time", "step_time", "wait_time", "tokens_per_second", "mfu"}
MODEL = {
    "model_type": "llama",
    "vocab_size": 17,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TASK = """
from jaxpost.tasks.arithmetic import conversation, record, test_records, tokenizer  # noqa: F401


def reward(record, completion):
    return sum(letter.isdigit() for letter in completion) / 4
"""
RECIPE = """
from jaxpost import recipe


def get_config(arg=""):
    return recipe.make(**{settings!r})
"""


def settings(folder: Path, **changes) -> dict:
    """What `recipe.make` takes for a model of two layers and the task in `folder`."""
    (folder / "task.py").write_text(TASK)
    # Of several stages, all is read by one.
    source = "any" if "stages" in changes else changes.get("do", changes.get("source", "data"))
    files = {"window": 32, "held_out": 0.05} if source in ("any", "data") else {}
    trained = {"batch_size": 16, "optimizer": {"lr": 1e-3, "warmup": 0.07}, "log_every": 1}  # two of thirty steps
    rollouts = {"prompt_window": 12, "new": 6} | ({"group": 4} if source != "data" else {})
    tested = {} if source == "generate" else {"eval_per_cell": 1}
    asked = {**tested, "eval_rows": 16, "rollouts": rollouts} if source != "data" or changes.get("task", True) else {}
    return {
        "model": MODEL,
        "tokenizer": "tasks.arithmetic.tokenizer",
        "task": {"name": str(folder / "task.py"), "examples": 300},
        **({} if source == "generate" else trained),
        **files,
        **asked,
        **changes,
    }


def stages(folder: Path) -> dict:
    """The settings of the three stages."""
    return settings(
        folder,
        stages=("sft", "reinforce", "control"),
        save_every=4,
        sft={"ema": 0.9, "microbatches": 2, "steps": 30, "eval_every": 8},
        # Batches of rollouts that are used up at no checkpoint, and one that waits at each; and a reference.
        reinforce={
            "source": "rollouts",
            "objective": {"name": "policy_gradient.grpo"},
            "rollouts": {"minibatches": 3, "lag": 1, "segment": 2},
            "steps": 30,
            "eval_every": 10,
            "best": "eval/reward",
            "highest": True,
        },
        control={
            "model": "@sft",
            "time_of": "reinforce",
            "steps": 100000,
            "save_every": 0,
            "optimizer": {"lr": 1e-3, "warmup": 2},
        },
    )


def write(folder: Path, chosen: dict) -> Path:
    """A recipe file with these settings."""
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(settings=chosen))
    return path


def command(config, workdir=None, *more: str) -> list[str]:
    """The real command line."""
    where = [] if workdir is None else [f"--workdir={workdir}"]
    return [sys.executable, "-m", "jaxpost.train", f"--config={config}", *where, *more]


def start(arguments: list[str]) -> subprocess.Popen:
    """The command, on one device, so that it starts and steps fast."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows(path: Path) -> list[dict]:
    """A JSON-lines file without what depends on the clock. Rows end in a newline, the last one too."""
    text = path.read_text()
    assert text.endswith("\n")
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]


def saved(workdir: Path, name: str) -> dict[int, tuple[dict, dict]]:
    """{step: (the whole train state by path, meta)} of every checkpoint that a stage kept, through the loop's own restore."""
    config = recipe.make(**json.loads((workdir / "config.json").read_text()))
    mesh = sharding.make_mesh(fsdp=2, tensor=2)  # not the one it was written on
    with sharding.use(mesh):
        settings = dict(recipe.stages(config))[name]
        if any(links.references(settings.data)):
            settings.data = ",".join(str(p) for p in (workdir / "rows").glob("*/part-*.jsonl"))
        plan = plan_stage(name, settings, mesh)
        kept = checkpoint.Checkpoints(workdir / "checkpoints" / name)
        found = {}
        for step in sorted(int(p.name) for p in (workdir / "checkpoints" / name).iterdir()):
            state = train._restore(plan, kept, step, optim.make(plan.settings.optimizer, plan.steps), mesh)
            leaves = jax.tree_util.tree_leaves_with_path(state)
            values = {sharding.path_name(path): jax.device_get(x) for path, x in leaves}
            found[step] = values, kept.meta(step)
        kept.close()
    return found
