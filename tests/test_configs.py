"""Every recipe takes two steps at a tiny size on eight simulated devices."""

import ast
import json
from pathlib import Path

import jax
import pytest

from jaxpost import annotate, recipe, sharding, train
from jaxpost.config import resolve
from jaxpost.declare import declared
from jaxpost.models import families, hf
from jaxpost.models.transformer import Transformer
from jaxpost.stages import datasets
from jaxpost.stages import rollouts as stages_rollouts
from jaxpost.stages.plan import plan_stage
from jaxpost.tasks import arithmetic
from jaxpost.tokenizer import save

grpo = resolve.module(str(Path(__file__).parent.parent / "configs" / "grpo.py"), "configs")
FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted([*FOLDER.glob("[!_]*.py"), *(FOLDER / "papers").glob("[!_]*.py")])
# test_readme.py runs the quickstart's stages, and test_papers.py the arms of studies.
SHORT = [path for path in CONFIGS if path.stem != "quickstart" and "\nSTUDY = " not in path.read_text()]
TINY = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def model_folder(folder: Path) -> str:
    arch = families.architecture(TINY)
    hf.save(folder, Transformer(arch).init(jax.random.PRNGKey(0)), arch, TINY)
    words = arithmetic.tokenizer()
    words.mask_token = words.pad_token  # which only masked language models read
    save(words, folder)
    return str(folder)


def data_file(path: Path, shape: str) -> str:
    rows = [arithmetic.conversation(i) for i in range(64)]
    if shape == "pairs":
        wrong = [row["messages"][:-1] + [{"role": "assistant", "content": "0" * (1 + i % 2)}] for i, row in enumerate(rows)]
        rows = [{"chosen": row["messages"], "rejected": other} for row, other in zip(rows, wrong, strict=True)]
        rows = [row for row in rows if row["chosen"] != row["rejected"]]
    elif shape == "lists":
        turns = [[turn["content"] for turn in row["messages"]] for row in rows]
        rows = [{"query": asked, "positives": [answer], "negatives": [answer + "0"]} for asked, answer in turns]
    elif shape not in ("demonstrations", "masked"):
        rows = [{"messages": row["messages"], "label": i % 3 > 0} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", SHORT, ids=lambda p: p.stem)
def test_two_steps(path, tmp_path):
    config = resolve.find(f"{path}:get_config", "configs")()
    with config.unlocked():
        config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
        if config.source != "rollouts":  # which reads neither
            config.window, config.held_out = 64, 0.1
        if config.model:
            own = ("vocab_size", "max_position_embeddings") if path.stem == "tiny" else ()  # whose tokenizer is larger
            config.model = {**config.model.to_dict(), **{k: v for k, v in TINY.items() if k not in own}}
        else:
            shape = datasets.row_type(resolve.resolve(config.objective.to_dict(), "objectives")).name
            config.model, config.data = model_folder(tmp_path / "model"), data_file(tmp_path / "data.jsonl", shape)
        if config.task and config.task.name == "gsm8k":  # whose files would be fetched
            config.task = {"name": "arithmetic"}
        if path.stem == "stories":  # which tell of words that the tiny tokenizer has no letters for
            config.task, config.reward, config.template = {"name": "arithmetic"}, {"right": "task"}, ""
            config.microbatches = 2
        if config.source == "rollouts":
            config.data = ""
            config.rollouts.update({"prompt_window": 12, "new": 8, "overlong": min(config.rollouts.overlong, 4)})
        if "teacher" in config.objective:
            config.objective.teacher = model_folder(tmp_path / "teacher")
        if config.task:
            config.task.examples, config.eval_per_cell, config.eval_rows = 200, 1, 8
        each = [config[name] for name in config.stages] or [config]
        if any(settings.get("do") == "generate" for settings in each):  # an untrained model is right about this now and then
            (tmp_path / "easy.py").write_text("def odd(record, completion) -> bool:\n    return len(completion) % 2 == 1\n")
            config.reward = f"{tmp_path / 'easy.py'}:odd"
        for settings in (settings for settings in each if settings.get("do") == "generate"):
            settings.task.examples = 200
        for settings in (settings for settings in each if settings.get("do", "train") == "train"):
            settings.steps, settings.batch_size, settings.optimizer.warmup = 2, 16, 0
    if path.stem == "distill":
        annotate.annotate(config, {"name": "topk", "k": 4}, out=tmp_path / "teacher")
        config.annotations = str(tmp_path / "teacher")
    train.run(config, tmp_path / "run")
    assert sharding.batch_ways() == 1, "the mesh must not outlive the run"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for stage in [name for name in config.stages if config[name].get("do", "train") == "train"] or ("train",):
        losses = [row["loss"] for row in rows if row["stage"] == stage and "loss" in row]
        assert losses and all(abs(x) < 10 for x in losses)


def test_every_folder_of_recipes_is_packaged():
    setup = ast.parse((FOLDER.parent / "setup.py").read_text())
    (packaged,) = [node.value for node in setup.body if isinstance(node, ast.Assign) and node.targets[0].id == "RECIPES"]
    folders = {".".join(path.parent.relative_to(FOLDER.parent).parts) for path in FOLDER.rglob("*.py")}
    assert set(ast.literal_eval(packaged)) == folders


@pytest.mark.parametrize("argument", grpo.PRESETS)
def test_every_preset_can_be_planned(argument, tmp_path):
    """Its rollouts and what it learns from them go together; nothing is compiled."""
    model = {**TINY, "vocab_size": 17, "max_position_embeddings": 1024}
    settings = {"model": model, "tokenizer": "tasks.arithmetic.tokenizer", "task": {"name": "arithmetic"}}
    ((name, s),) = recipe.stages(recipe.opened(grpo.get_config(argument), **settings))
    plan = plan_stage(name, s, sharding.make_mesh())
    assert plan.source.prompts * s.rollouts.group == s.batch_size * s.rollouts.minibatches
    assert ("ref_logps" in declared(plan.objective, "columns")) == (argument in ("rloo", "grpo", "reinforce_pp", "tulu"))


def test_advantages_of_ones_own_keep_the_objectives_beta():
    """An objective asks for the reference because of its beta; other advantages that take one get it."""
    own = {"name": "leave_one_out", "beta": 0.05}
    assert stages_rollouts._advantages("", own).keywords == {"beta": 0.05}
    assert stages_rollouts._advantages("reinforce_pp_baseline", own).keywords == {"beta": 0.05}
    assert stages_rollouts._advantages('{"name": "reinforce_pp", "beta": 0.2}', own).keywords == {"beta": 0.2}
    assert stages_rollouts._advantages("centred", own).keywords == {}
