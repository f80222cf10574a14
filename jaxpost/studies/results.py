"""What a scored study leaves, PAPERS/results/NAME.json, and what holds it to its file.

    fixed        digest of the claims, arms, seeds, tuning and recipes, and of the file's code
    commit       of the repository when it was scored; the file was committed as it is
    arms         {arm: {"settings": tuned, "seeds": {seed: {"figures", "spent"}}}}
    tuning       {arm: {settings: figure}}, on the tuning seed
    verdict, lines    as `claims.judge` computes them
    history      earlier results, each with the reason for which its claims were superseded
    checksum     of all of that

`check` recomputes the digest, the verdict and the checksum, so a claim, a margin, a seed, an arm or a figure that is changed by
hand is noticed.
"""

import ast
import dataclasses
import hashlib
import io
import json
import math
import subprocess
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpost import recipe
from jaxpost.config.resolve import find
from jaxpost.errors import UserError
from jaxpost.reporting.writers import replace
from jaxpost.storage.host import read_object
from jaxpost.studies.claims import Line, Study, judge
from jaxpost.studies.runs import Row, changed, difference, grid, models_of

RESULTS = "results"


def study_of(file: str) -> Study | None:
    """The STUDY of a recipe's file, or None where it has none."""
    module = find(f"{file}:get_config", "configs").__globals__
    study = module.get("STUDY")
    if study is not None and not isinstance(study, Study):
        raise UserError(f"{file}: STUDY is a {type(study).__name__}; make it a jaxpost.studies.Study.")
    return study


def recipes(file: str, study: Study) -> dict:
    """{arm: its recipe}. Raises UserError where an arm has no setting that is tuned."""
    arms = {arm: recipe.opened(f"{file}:{argument}") for arm, argument in study.arms.items()}
    for arm, config in arms.items():
        changed(config, {path: values[0] for path, values in study.tune.items()}, arm)
    return arms


def path_of(file: str) -> Path:
    """Where a study's results lie."""
    return Path(file).parent / RESULTS / f"{Path(file).stem}.json"


def title(file: str) -> str:
    """The first line of a file's docstring, without a full stop: the paper's title."""
    return (ast.get_docstring(ast.parse(Path(file).read_text())) or "").split("\n")[0].rstrip(".")


def fixed(file: str, study: Study) -> str:
    """A digest of what must not change once a study is scored: the study, its arms' recipes, those of the models that they
    start from, and the file's code.
    """
    folder = str(Path(file).resolve().parent)
    arms = {arm: difference(config) for arm, config in recipes(file, study).items()}
    models = {path: settings for arm in arms.values() for path, settings in models_of(arm).items()}
    about = {"study": dataclasses.asdict(study), "arms": arms, "models": models, "code": _code(Path(file).read_text())}
    text = json.dumps(about, sort_keys=True, default=str).replace(json.dumps(folder)[1:-1], "")  # of names of its own functions
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _code(source: str) -> str:
    """A file's code without comments, white space and its docstring."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    tokens = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in skipped]
    return " ".join(tokens[1:] if ast.get_docstring(ast.parse(source)) else tokens)


def code_of_runs(file: str) -> str:
    """A file's code without its docstring, comments and STUDY: what its runs depend on besides their recipes."""
    module = ast.parse(Path(file).read_text())
    kept = [node for node in module.body if "STUDY" not in [getattr(t, "id", "") for t in getattr(node, "targets", ())]]
    return ast.dump(ast.Module(kept[1:] if ast.get_docstring(module) else kept, []))


def commit_of(file: str) -> str:
    """The commit that has the file as it is; "" where the file is in no repository.

    Raises UserError where it was changed since, or was never committed: what is claimed is fixed before it is scored.
    """
    place = Path(file).resolve()

    def git(*arguments: str) -> str | None:
        result = subprocess.run(["git", *arguments], cwd=place.parent, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        inside = git("rev-parse", "--is-inside-work-tree")
    except FileNotFoundError:  # no git
        return ""
    if inside != "true":
        return ""
    if git("ls-files", place.name) == "" or git("status", "--porcelain", "--", place.name):
        raise UserError(
            f"{file}: is not committed as it is. Claims are fixed before they are scored: commit it, or use --pilot."
        )
    return git("rev-parse", "--short=12", "HEAD") or ""


def write(
    file: str, study: Study, rows: Mapping[str, Mapping[int, Row]], tuning: Mapping[str, Mapping], about: Mapping
) -> dict:
    """Writes a scored study's results and returns them. rows: {arm: {seed: Row}}; about: what else is recorded (commit, ...).

    Raises UserError where results of other claims are there already and `superseded` gives no reason.
    """
    path, now = path_of(file), fixed(file, study)
    before = read_object(path) if path.exists() else {}
    history = before.get("history", [])
    if before and before["fixed"] != now:
        if len(study.superseded) <= len(history):
            raise UserError(
                f"{path}: has the results of other claims or code, which are not replaced without a reason: add it to "
                "Study(superseded=(...,)), which keeps them."
            )
        kept = {k: v for k, v in before.items() if k not in ("history", "checksum")}
        history = [*history, {**kept, "reason": study.superseded[len(history)]}]
    names = study.metrics()
    arms = {
        arm: {
            "settings": next(iter(by_seed.values())).changes,
            "seeds": {
                str(seed): {"figures": {name: row.figures.get(name) for name in names}, "spent": row.spent}
                for seed, row in by_seed.items()
            },
        }
        for arm, by_seed in rows.items()
    }
    content = {"title": title(file), "family": study.family, "fixed": now, **about, "arms": arms, "tuning": tuning}
    verdict, lines = judged(study, content)
    content |= {"verdict": verdict, "lines": [_line(line) for line in lines], "history": history}
    content["checksum"] = checksum(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, (json.dumps(content, indent=1) + "\n").encode())
    return content


def best(study: Study, figures: Mapping[str, float]) -> dict[str, Any]:
    """The settings {path: value} of the best of an arm's trials {settings as text: figure}; the first of equal ones."""
    if not figures:
        return {}
    sign = 1 if study.lower else -1
    return grid(study.tune)[min(figures, key=lambda name: sign * figures[name])]


def judged(study: Study, content: Mapping) -> tuple[str, list[Line]]:
    """The verdict and its lines, of what a results file records."""
    seeds = {arm: {int(seed): one for seed, one in each["seeds"].items()} for arm, each in content["arms"].items()}
    figures = {arm: {seed: one["figures"] for seed, one in by_seed.items()} for arm, by_seed in seeds.items()}
    spent = {arm: {seed: one["spent"] for seed, one in by_seed.items()} for arm, by_seed in seeds.items()}
    return judge(study, figures, spent)


def _line(line: Line) -> dict:
    rounded = {name: [round(x, 6) for x in line.effects] if name == "effects" else getattr(line, name) for name in _FIELDS}
    return {name: _finite(value) for name, value in rounded.items()}


_FIELDS = tuple(field.name for field in dataclasses.fields(Line))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def checksum(content: Mapping) -> str:
    """Of a results file without its own checksum."""
    text = json.dumps({k: v for k, v in content.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(file: str) -> str:
    """What is wrong with a study's committed results; "" where they are there and agree with the file."""
    study, path = study_of(file), path_of(file)
    if study is None:
        return f"{file}: has no STUDY."
    if not path.exists():
        return f"{path}: there is none; the study has not been scored."
    content = read_object(path)
    if content.get("checksum") != checksum(content):
        return f"{path}: was changed by hand."
    if content["fixed"] != fixed(file, study):
        return f"{file}: its claims, arms, seeds, recipes or code are not those that were scored; score it again."
    if set(content["arms"]) != set(study.arms):
        return f"{path}: has the arms {', '.join(content['arms'])}, the study {', '.join(study.arms)}."
    if wrong := [a for a, each in content["arms"].items() if [int(seed) for seed in each["seeds"]] != list(study.seeds)]:
        return f"{path}: the seeds of {wrong[0]} are not the study's {study.seeds}."
    if wrong := [arm for arm in study.arms if content["arms"][arm]["settings"] != best(study, content["tuning"][arm])]:
        return f"{path}: the settings of {wrong[0]} are not those that were best on the tuning seed."
    verdict, lines = judged(study, content)
    if (content["verdict"], content["lines"]) != (verdict, [_line(line) for line in lines]):
        return f"{path}: its verdict is not the one that follows from its figures."
    return ""


def gallery(folder) -> str:
    """The README of a folder of papers: a line for each, of its results."""
    rows = []
    for file in studies(folder):
        content = read_object(path_of(file)) if path_of(file).exists() else {}
        rows.append(_entry(file, content))
    head = "| paper | family | claim | effect (95% interval) | verdict | minutes |\n|---|---|---|---|---|---|\n"
    return _PREFACE + head + "".join(rows)


_PREFACE = """# Papers

Generated by `python -m jaxpost.study --table`. An effect is the mean over seeds of a paired difference; the rules are in
[docs/papers.md](../../docs/papers.md).

"""


def studies(folder) -> list[str]:
    """The files of a folder that have a study."""
    files = sorted(str(path) for path in Path(folder).glob("[!_]*.py"))
    return [file for file in files if "\nSTUDY = " in Path(file).read_text()]


def _entry(file: str, content: Mapping) -> str:
    name = f"[{title(file)}]({Path(file).name})"
    if not content:
        return f"| {name} | {study_of(file).family} | | | not scored | |\n"
    lines = content["lines"]
    claims = "<br>".join(line["claim"] for line in lines)
    effects = "<br>".join(effect(line) for line in lines)
    verdicts = f"**{content['verdict']}**" + ("<br>" + "<br>".join(line["verdict"] for line in lines) if len(lines) > 1 else "")
    return f"| {name} | {content['family']} | {claims} | {effects} | {verdicts} | {content.get('minutes', '')} |\n"


def effect(line: Mapping) -> str:
    """A line's effect with its interval, as text."""
    low, high = (("-inf" if i == 0 else "inf") if x is None else f"{x:+.3g}" for i, x in enumerate((line["low"], line["high"])))
    return f"{line['mean']:+.3g} ({low} to {high})"


def text(content: Mapping, metrics: Sequence[str]) -> str:
    """A scored study as plain text: its verdict, a line for each claim, and a table of the arms."""
    lines = [f"{content['title']}: {content['verdict']}"]
    lines += [f"  {line['verdict']}: {line['claim']}; {effect(line)}" for line in content["lines"]]
    for arm, each in content["arms"].items():
        values = {name: [one["figures"][name] for one in each["seeds"].values()] for name in metrics}
        shown = "  ".join(f"{name} {' '.join('-' if x is None else f'{x:.3f}' for x in xs)}" for name, xs in values.items())
        settings = " ".join(f"{path}={value}" for path, value in each["settings"].items())
        lines.append(f"  {arm:16} {shown}  {settings}")
    return "\n".join(lines)
