"""The README, docs/ and CONTRIBUTING tell the truth: every command, setting, link, path and name in them."""

import ast
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import absl.flags
import pytest
from ml_collections import config_flags

from jaxpost import recipe
from jaxpost.config import cli, naming

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
USER_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]
PAGES = [*USER_PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PLACED = re.compile(r"(?<![\w./])(?:jaxpost|configs|docs|launch|tests|benchmarks|notebooks)/[\w./]*\w")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str = README, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, module, arguments) of each `python -m jaxpost.MODULE ...` in a block, or in a line of text between backticks."""
    found = []
    for page in USER_PAGES:
        text = page.read_text()
        lines = "".join(blocks(text)).replace("\\\n", " ").splitlines()
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        for line in lines:
            if call := re.search(r"python -m jaxpost\.(\w+)(?: ([^.\s].*))?$", line):
                found.append((named(page), call[1], shlex.split(call[2] or "")))
    return found


COMMANDS = commands()


def test_the_first_page_is_short():
    assert len(README.split()) <= 900, "the rest belongs in docs/"


def test_the_first_two_blocks_are_the_two_commands():
    run, test = blocks()[:2]
    assert "python3 -m venv" in run and run.strip().splitlines()[-1].startswith(".venv/bin/python -m jaxpost.train --config=")
    assert "python3 -m venv" in test and test.strip().splitlines()[-1].startswith(".venv/bin/python -m pytest")


def test_the_page_of_the_tree_names_every_file():
    tree = (ROOT / "docs" / "tree.md").read_text()
    for path in sorted((ROOT / "jaxpost").iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            assert f"{path.name} " in tree, f"docs/tree.md lacks {path.name}"
        elif path.is_dir() and (path / "__init__.py").exists():
            line = next(line for line in tree.splitlines() if line.strip().startswith(f"{path.name}/"))
            for file in path.glob("[!_]*.py"):
                assert re.search(rf"\b{file.stem}\b", line), f"the line of docs/tree.md for {path.name}/ lacks {file.stem}"
    for word in re.findall(r"(\w+)\.py", tree):
        assert [*ROOT.glob(f"{word}.py"), *(ROOT / "jaxpost").rglob(f"{word}.py")], (
            f"docs/tree.md names {word}.py, which is not there"
        )


def test_the_readmes_tree_names_every_folder_and_every_command():
    tree = README.split("## The tree")[1].split("## The nouns")[0]
    places = [re.split(r"\s{2,}", line.strip())[0] for line in tree.splitlines() if line.startswith("    ")]
    entries = {entry for place in places for entry in place.split(", ")}
    folders = {f"{path.parent.name}/" for path in (ROOT / "jaxpost").glob("*/__init__.py")}
    started = {path.stem for path in (ROOT / "jaxpost").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert folders | started <= entries
    present = [*ROOT.iterdir(), *(ROOT / "jaxpost").iterdir()]
    there = {f"{path.name}/" if path.is_dir() else path.stem for path in present}
    assert entries <= there


def flags_of(module: str) -> tuple[absl.flags.FlagValues, bool]:
    """(the flags of `python -m jaxpost.MODULE`, whether it takes a recipe): its main block, run with main left out."""
    values, takes = absl.flags.FlagValues(), {}
    defines = [name for name in dir(absl.flags) if name.startswith("DEFINE_")]
    own = types.SimpleNamespace(**{n: functools.partial(getattr(absl.flags, n), flag_values=values) for n in defines})
    loaded = importlib.import_module(f"jaxpost.{module}")
    tree = ast.parse(Path(loaded.__file__).read_text())
    (main,) = [node for node in tree.body if ast.unparse(node).startswith("if __name__ ==")]
    body = ast.Module([node for node in main.body if not isinstance(node, ast.ImportFrom)], [])
    stand_ins = {"flags": own, "app": types.SimpleNamespace(run=lambda main: None)}
    stand_ins["cli"] = types.SimpleNamespace(run=lambda main, about, **keywords: takes.update(keywords))
    exec(compile(body, loaded.__file__, "exec"), {**vars(loaded), **stand_ins})
    if takes.get("config"):
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    if takes.get("model"):
        own.DEFINE_multi_string("trust", [], "")
    if takes.get("distributed"):
        own.DEFINE_bool("distributed", False, "")
    return values, bool(takes.get("config"))


@pytest.mark.parametrize("page, module, arguments", COMMANDS, ids=[f"{page}-{module}" for page, module, _ in COMMANDS])
def test_every_command_is_understood(page, module, arguments, monkeypatch):
    """Its flags are there, its recipe is there, and the recipe with its settings adds up; nothing is opened or compiled."""
    monkeypatch.chdir(ROOT)
    values, takes_recipe = flags_of(module)
    argv, own = ["jaxpost", *arguments], []
    if takes_recipe:
        argv, own = cli._new_keywords(cli._find_recipe(argv))
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks
    rest = values(argv)
    assert not rest[1:] or module == "report", "an argument without a flag"
    if takes_recipe and (module != "study" or values.config is not None):  # of all papers it needs none
        for path, value in own:
            recipe.put(values.config, path, value)
        assert recipe.stages(values.config)


def exists(setting: str) -> bool:
    """Whether --config.SETTING is one: a key of the loop, of a stage of the quickstart, or of a named function."""
    parts, level = setting.split("."), recipe.DEFAULTS
    for part in parts[parts[0] in recipe.opened("configs/quickstart.py").stages :]:
        if part not in level:
            return False
        level = level[part]
        if part in naming.NOUNS:
            return True
    return True


@pytest.mark.parametrize("page", USER_PAGES, ids=named)
def test_every_setting_and_flag_in_the_text_exists(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    settings = set(re.findall(r"--config\.([\w.]*\w)", text)) - {"KEY"}
    assert {setting for setting in settings if not exists(setting)} == set()
    flags = {name for module in {module for _, module, _ in COMMANDS} for name in flags_of(module)[0]}
    flags |= set(re.findall(r"--(\w[\w-]*)", (ROOT / "launch" / "tpu_vm.sh").read_text()))
    assert set(re.findall(r"(?<![\w-])--(\w+)(?![\w.-])", text)) - {"help"} <= flags


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_and_path_leads_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            path, _, section = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{named(page)}: no {link}"
            if section:
                titles = re.findall(r"^#+ (.*)", target.read_text(), re.M)
                assert section in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link
    for path in PLACED.findall(" ".join(re.findall(r"`([^`\n]+)`", text))):
        assert (ROOT / path).exists() or (page.parent / path).exists(), f"{named(page)}: no {path}"


def test_every_page_of_docs_is_linked_from_the_first_page():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"\]\(([^)\s#]+)", README))


TASKS = [(page, cell) for page in USER_PAGES for cell in blocks(page.read_text(), "python") if "def test_records" in cell]


@pytest.mark.parametrize("page, cell", TASKS, ids=[named(page) for page, _ in TASKS])
def test_the_tasks_in_the_text_are_tasks(page, cell):
    task = {}
    exec(cell, task)
    problems = task["test_records"](4)
    assert len(problems) >= 4 and task["record"](7) == task["record"](7)
    assert {task["reward"](problems[0], text) for text in ("a happy dog", "a dog")} == {True, False}


def test_python_in_the_text_compiles():
    for page in PAGES:
        for cell in blocks(page.read_text(), "python"):
            compile(cell, str(page), "exec")


@pytest.mark.slow
def test_the_first_command_runs_with_little_to_do(tmp_path):
    command = shlex.split(blocks()[0].strip().splitlines()[-1])
    command = [sys.executable, *command[1:-1], f"--workdir={tmp_path}"]
    little = [
        "sft.steps=4",
        "dpo.steps=2",
        "drawn.task.examples=100",
        f"reward={tmp_path / 'easy.py'}:odd",  # what an untrained model is right about now and then
        "grpo.steps=2",
        "grpo.batch_size=16",
        "task.examples=300",
        "eval_per_cell=2",
        *(f"{stage}.optimizer.warmup=0" for stage in ("sft", "dpo", "grpo")),
    ]
    (tmp_path / "easy.py").write_text("def odd(record, completion) -> bool:\n    return len(completion) % 2 == 1\n")
    env = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        command + [f"--config.{x}" for x in little], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    judged = [(row["stage"], row["step"]) for row in rows if "eval/accuracy/+2" in row]
    assert [x for x in judged if x[1] == 0] == [("sft", 0), ("dpo", 0), ("grpo", 0)]
    assert ("sft", 4) in judged and ("grpo", 2) in judged
    closing = [line for line in done.stderr.splitlines() if re.fullmatch(r"\w+: eval/accuracy \d+% -> \d+%", line)]
    assert [line.partition(":")[0] for line in closing] == ["sft", "dpo", "grpo"], "a stage ends with what it changed"
    assert "eval/accuracy_greedy" in json.loads(done.stdout) and "<svg" in (tmp_path / "report.html").read_text()
