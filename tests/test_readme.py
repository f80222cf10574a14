"""The README's commands, tree and table tell the truth."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks():
    return re.findall(r"^```\n(.*?)^```", README, re.M | re.S)


def test_the_first_two_blocks_are_the_two_commands():
    run, test = blocks()[:2]
    assert "python3 -m venv" in run and run.strip().splitlines()[-1].startswith(".venv/bin/python -m jaxpost.train --config=")
    assert "python3 -m venv" in test and test.strip().splitlines()[-1].startswith(".venv/bin/python -m pytest")


def test_the_tree_names_every_file():
    tree = README.split("## The tree")[1].split("## The nouns")[0]
    for path in sorted((ROOT / "jaxpost").iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            assert f"{path.name} " in tree, f"the README's tree lacks {path.name}"
        elif path.is_dir() and (path / "__init__.py").exists():
            line = next(line for line in tree.splitlines() if line.strip().startswith(f"{path.name}/"))
            for file in path.glob("[!_]*.py"):
                assert file.stem in line, f"the README's line for {path.name}/ lacks {file.stem}"
    for word in re.findall(r"(\w+)\.py", tree):
        assert list(ROOT.rglob(f"{word}.py")), f"the README's tree names {word}.py, which is not there"


@pytest.mark.slow
def test_the_first_command_runs_with_little_to_do(tmp_path):
    command = shlex.split(blocks()[0].strip().splitlines()[-1])
    command = [sys.executable, *command[1:-1], f"--workdir={tmp_path}"]
    little = [
        "sft.steps=4",
        "dpo.steps=2",
        "dpo.task.examples=100",
        f"reward={tmp_path / 'easy.py'}:odd",  # what an untrained model is right about now and then
        "grpo.steps=2",
        "control.steps=2",
        "grpo.batch_size=16",
        "task.examples=300",
        "eval_per_cell=2",
        *(f"{stage}.optimizer.warmup=0" for stage in ("sft", "dpo", "grpo", "control")),
    ]
    (tmp_path / "easy.py").write_text("def odd(record, completion) -> bool:\n    return len(completion) % 2 == 1\n")
    env = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        command + [f"--config.{x}" for x in little], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    judged = [(row["stage"], row["step"]) for row in rows if "eval/accuracy/+2" in row]
    assert [x for x in judged if x[1] == 0] == [("sft", 0), ("dpo", 0), ("grpo", 0), ("control", 0)]
    assert ("sft", 4) in judged and ("grpo", 2) in judged
    assert "eval/accuracy_greedy" in json.loads(done.stdout) and "<svg" in (tmp_path / "report.html").read_text()
