"""A stage that evaluates: figures of a model that does not train.

    figures={"do": "evaluate", "model": "@dpo", "evals": {"sums": {"name": "accuracy", "task": "arithmetic"}}}

Each of `evals` is a function of evals/, or of a user's file. Figures are eval/NAME/figure in metrics.jsonl; samples.jsonl has a
row for every problem.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxpost import sharding
from jaxpost.config.naming import digest_of
from jaxpost.config.resolve import entries
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.models.identity import identity
from jaxpost.recipe import plain
from jaxpost.reporting import writers
from jaxpost.stages import datasets
from jaxpost.stages.evaluation import Eval, configured, model_of, run_evals
from jaxpost.stages.run import Output, Run
from jaxpost.storage.artefacts import Artefact


class Evaluate(NamedTuple):
    """A stage that evaluates, checked."""

    name: str
    settings: Any
    spec: loading.ModelSpec
    evals: list[Eval]


def planned(name: str, s, run: Run) -> Evaluate:
    """Checks the model and the evals. Raises UserError for what is wrong with one."""
    if not s.evals:
        example = "{'sums': {'name': 'accuracy', 'task': 'arithmetic'}}"
        raise UserError(f"config.{name}.evals: name what to evaluate, as {example}.")
    spec = run.described(s)
    about = {key: plain(s[key]) for key in ("dtype", "attention", "mesh")}
    evals = configured(plain(s.evals), model_of(spec, None, run.mesh), template=datasets.template(spec, s), about=about)
    return Evaluate(name, s, spec, evals)


def output(plan: Evaluate) -> Output:
    """Figures are nobody's input."""
    return Output(pending=True)


def make(plan: Evaluate, run: Run) -> Output:
    """Runs the evals on the model, unless that was done before, and writes the figures to the log."""
    s, origin = plan.settings, run.starting(plan.spec, plan.settings)
    about = {"weights": identity(origin, s.seed), "evals": {each.name: each.digest for each in plan.evals}}
    about |= {"files": files(plain(s.evals)), "tokenizer": digest_of(plan.spec.tokenizer.backend_tokenizer.to_str())}
    artefact = Artefact(run.root, "figures", about)
    _, done = artefact.resume()
    if not done:
        with run.stop.saving(f"{plan.name}, while it evaluated"):
            params = loading.weights(origin, run.mesh, s.seed)
            figures, rows = run_evals(model_of(origin, params, run.mesh), plan.evals)
            figures = {f"eval/{name}": value for name, value in figures.items()}
            if jax.process_index() == 0:
                artefact.write(".json", (json.dumps({"figures": figures, "rows": rows}) + "\n").encode())
        sharding.agree(0.0)  # nobody reads before all is written
    (part,) = artefact.folder.glob("part-*.json")
    content = json.loads(part.read_text())
    if jax.process_index() == 0:
        if not (done and _logged(plan, run)):
            _log(plan, run, content["figures"], content["rows"])
        shown = {k: v for k, v in content["figures"].items() if not k.endswith(("_low", "_high", "_se"))}
        print(f"{plan.name}: " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items()), file=sys.stderr)
    return Output(figures=content["figures"])


def files(value: Any) -> dict[str, str]:
    """{name: digest of its bytes} of the files that settings name, as FILE, FILE=WEIGHT or FILE:NAME, with commas between."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return {name: digest for each in value for name, digest in files(each).items()}
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return files(entries(value, "config.evals"))
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else []
    names = {name for part in parts for name in (part, part.rpartition("=")[0], part.rpartition(":")[0]) if name}
    return {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in sorted(names) if os.path.isfile(name)}


def _logged(plan: Evaluate, run: Run) -> bool:
    path = run.workdir / "metrics.jsonl"
    return path.exists() and any(row["stage"] == plan.name for row in writers.read_rows(path))


def _log(plan: Evaluate, run: Run, figures: dict, rows: list[dict]) -> None:
    names = [*run.outputs]
    writers.cut_back(run.workdir, names[: names.index(plan.name) + 1], plan.name, -1)
    writer = writers.MetricWriter(run.workdir, json.loads(plan.settings.to_json()), names)
    writer.write(plan.name, 0, figures)
    writer.samples(plan.name, 0, rows)
    writer.close()
