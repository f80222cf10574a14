"""Studies and sweeps: many runs of recipes, compared by rules that are fixed before.

    python -m jaxpost.study --config=configs/papers/hpt.py            all arms, all seeds, the verdict
    python -m jaxpost.study --config=configs/papers/hpt.py --pilot    the arms on the tuning seed: nothing is scored
    python -m jaxpost.study --table                                   every paper: claim, verdict, minutes
    python -m jaxpost.study --check                                   whether the results belong to the claims
    python -m jaxpost.study --config=configs/sft.py --vary=optimizer.lr=1e-4,3e-4 --seeds=3

docs/papers.md says what a study is. A sweep runs every combination of the values with every seed, and compares the runs. All
runs of one command share a process; the same command goes on after an interruption.
"""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxpost.config import cli
from jaxpost.config.resolve import value_of
from jaxpost.errors import UserError
from jaxpost.reporting import report
from jaxpost.reporting.writers import replace
from jaxpost.storage import cloud
from jaxpost.studies import page, results
from jaxpost.studies.claims import Study
from jaxpost.studies.runs import Row, Runs, grid

PAPERS = "configs/papers"


def score(file: str, workdir=None) -> dict:
    """Runs a paper's study: each arm tries what is tuned, then runs with each seed.

    Writes results/NAME.json beside the file, and the page WORKDIR/study.html; returns the content of the former.
    Raises UserError where the file is not committed as it is, and where an arm fails.
    """
    study, commit = _study(file), results.commit_of(file)
    runs = _runs(file, study, workdir)
    chosen, tuning = tuned(study, runs)
    rows = {arm: {seed: runs.run(arm, seed, chosen[arm]) for seed in study.seeds} for arm in study.arms}
    seconds = sum(row.seconds for row in runs.rows.values())
    about = {
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "minutes": round(seconds / 60, 1),
        "machine": _machine(),
    }
    content = results.write(file, study, rows, tuning, about)
    page.write(runs.workdir / "study.html", content, rows, study.metrics())
    return content


def pilot(file: str, workdir=None) -> dict[str, list[Row]]:
    """{arm: its runs on the tuning seed, with each combination of what is tuned}. Nothing is scored, and no claim looked at."""
    study = _study(file)
    runs = _runs(file, study, workdir)
    trials = {arm: [runs.run(arm, study.tuning_seed, changes) for changes in grid(study.tune).values()] for arm in study.arms}
    for arm, rows in trials.items():
        for row in rows:
            shown = "  ".join(f"{name} {row.figures.get(name, float('nan')):.4g}" for name in study.metrics())
            settings = " ".join(f"{path}={value}" for path, value in row.changes.items())
            print(f"{arm:16} {shown}  {study.equal} {study.spent(row.spent):,.0f}  {row.seconds:.0f} s  {settings}")
    return trials


def tuned(study: Study, runs: Runs) -> tuple[dict[str, dict], dict[str, dict]]:
    """({arm: the settings that were best on the tuning seed}, {arm: {settings as text: figure}}); the first of equal ones."""
    chosen, tuning = {}, {}
    for arm in study.arms:
        figures = {}
        for name, changes in grid(study.tune).items() if study.tune else ():
            figures[name] = runs.run(arm, study.tuning_seed, changes).figures.get(study.metric)
            if figures[name] is None:
                raise UserError(f"arm {arm}: its run has no figure {study.metric!r}, which the study tunes by.")
        chosen[arm], tuning[arm] = results.best(study, figures), figures
    return chosen, tuning


def sweep(config, workdir, vary: Mapping[str, Sequence[Any]], seeds: int) -> str:
    """Runs a recipe with every combination of the settings {path: values} and seeds 0 to seeds - 1. Writes the page of their
    comparison, WORKDIR/compare.html; returns its table as text. Raises UserError for no seeds, and for a path that the recipe
    does not have.
    """
    if seeds < 1:
        raise UserError(f"--seeds={seeds}: give 1 or more.")
    combinations = grid(vary)
    runs = Runs(workdir, dict.fromkeys(combinations, config))
    rows = [runs.run(name, seed, changes) for name, changes in combinations.items() for seed in range(seeds)]
    path, text = report.comparison([row.workdir for row in rows], runs.workdir / "compare.html")
    return f"{text}\n{path}"


def _study(file: str) -> Study:
    if (study := results.study_of(file)) is None:
        raise UserError(f"{file}: has no STUDY; docs/papers.md says what one is. To compare settings of a recipe give --vary.")
    return study


def _runs(file: str, study: Study, workdir) -> Runs:
    """The runs of a study; a pilot's are those that scoring tunes by, whatever is claimed."""
    folder = workdir or str(cloud.cache_folder() / "studies" / Path(file).stem)
    return Runs(folder, results.recipes(file, study), results.code_of_runs(file))


def _machine() -> str:
    import jax

    return f"{os.cpu_count()} cores, {platform.machine()}, {jax.devices()[0].platform}, jax {jax.__version__}"


def _varied(texts: Sequence[str]) -> dict[str, list]:
    """{setting: values} of --vary=PATH=VALUE,VALUE."""
    vary = {}
    for text in texts:
        path, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--vary={text}: give a setting and its values, as --vary=optimizer.lr=1e-4,3e-4.")
        listed = value_of(values) if values.strip().startswith("[") else [value_of(value) for value in values.split(",")]
        if not isinstance(listed, list):
            raise UserError(f"--vary={text}: {values} is no JSON list; quote texts, and the whole in single quotes.")
        vary[path.removeprefix("config.")] = listed
    return vary


def _folder() -> Path:
    """The folder of papers: in the current directory, or that which came with jaxpost."""
    return next((path for path in (Path(PAPERS), Path(__file__).parent / PAPERS) if path.is_dir()), Path(PAPERS))


def main(_) -> None:
    """The command line; see the module's docstring."""
    options = flags.FLAGS
    if options.table:
        readme, text = _folder() / "README.md", results.gallery(_folder())
        replace(readme, text.encode())
        print(text)
        return
    if options.check:
        files = results.studies(_folder())
        scored = [file for file in files if results.path_of(file).exists()]
        problems = [problem for file in scored if (problem := results.check(file))]
        whole = f"{len(scored)} studies: the results belong to their claims. {len(files) - len(scored)} are not scored."
        print(*(problems or [whole]), sep="\n")
        sys.exit(bool(problems))
    (config,) = cli.required("config")
    file = config_flags.get_config_filename(options["config"]).partition(":")[0]
    if options.vary:
        (workdir,) = cli.required("workdir")
        print(sweep(config, workdir, _varied(options.vary), options.seeds))
        return
    if options.seeds != 1 or any(argument.startswith("--config.") for argument in sys.argv):
        raise UserError(
            f"{file}: a study's seeds and settings are fixed in its file; --seeds and --config.KEY are for sweeps (--vary)."
        )
    if options.pilot:
        pilot(file, options.workdir)
    else:
        print(results.text(score(file, options.workdir), _study(file).metrics()))


if __name__ == "__main__":
    from absl import flags
    from ml_collections import config_flags

    flags.DEFINE_string("workdir", None, "Folder for the runs and the page; of a study the cache's by default.")
    flags.DEFINE_bool("pilot", False, "Run the arms on the tuning seed only: a look before the claims are fixed.")
    flags.DEFINE_bool("table", False, "Print the table of all papers, and write it to configs/papers/README.md.")
    flags.DEFINE_bool("check", False, "Check that all committed results belong to their claims.")
    flags.DEFINE_multi_string("vary", [], "A setting and its values, KEY=VALUE,VALUE; give the flag once for each setting.")
    flags.DEFINE_integer("seeds", 1, "How many seeds a sweep runs each setting with.")
    cli.run(main, __doc__, config=True)
