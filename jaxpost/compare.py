"""Several runs on one page: what differs in their settings beside their final figures, and their curves in one chart each.

    python -m jaxpost.report runs/*

prints the table and writes compare.html. Runs whose settings differ by `seed` alone are one line of the table: the mean and
the standard deviation (of a sample, n - 1) over their seeds.
"""

import html
import json
import statistics

from jaxpost import chart, cloud
from jaxpost.errors import UserError
from jaxpost.recipe import flat
from jaxpost.writers import METRICS, read_rows

FIGURES = ("eval/accuracy", "eval/accuracy_greedy", "eval/reward", "eval/reward_greedy", "eval/loss")  # of the table
CURVES = ("loss", "reward", "grad_norm", "entropy", "kl")  # drawn besides all figures of evaluations but those of cells


def read(workdirs) -> dict[str, tuple[dict, list[dict]]]:
    """{folder: (its settings, flat, and its rows of metrics)}. Raises UserError for a folder without a run."""
    runs = {}
    for workdir in map(cloud.path, workdirs):
        if not (workdir / "config.json").exists() or not (workdir / METRICS).exists():
            raise UserError(f"{workdir}: no run is there (config.json and {METRICS}); give the workdirs of runs.")
        runs[str(workdir)] = flat(json.loads((workdir / "config.json").read_text())), read_rows(workdir / METRICS)
    return runs


def table(runs: dict) -> list[list[str]]:
    """The head and the rows of the comparison: the runs' names, the settings that differ, their final figures."""
    keys = {key for settings, _ in runs.values() for key in settings}
    differ = sorted(k for k in keys if len({json.dumps(settings.get(k)) for settings, _ in runs.values()}) > 1 and k != "seed")
    groups: dict = {}
    for name, (settings, rows) in runs.items():
        groups.setdefault(tuple(json.dumps(settings.get(k, "-")) for k in differ), []).append((name, _final(settings, rows)))
    named = {name for own in groups.values() for _, final in own for name in final}
    figures = [name for name in (*FIGURES, "loss") if name in named]
    figures = figures[:-1] if figures[-1:] == ["loss"] and len(figures) > 1 else figures
    lines = [["runs", *differ, "seeds", *figures]]
    for values, own in groups.items():
        spread = [_spread([final[name] for _, final in own if final.get(name) is not None]) for name in figures]
        lines.append([" ".join(name for name, _ in own), *(v.strip('"') for v in values), str(len(own)), *spread])
    return lines


def _final(settings: dict, rows: list[dict]) -> dict:
    """The last value of each figure in the stage that is the run's result."""
    stage = settings.get("result") or (rows[-1]["stage"] if rows else "")
    return {name: row[name] for row in rows if row["stage"] == stage for name in (*FIGURES, "loss") if name in row}


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.4g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def curves(runs: dict, colours) -> list[str]:
    """A chart for each stage and metric in which the runs lie over each other."""
    lines: dict = {}
    for run, (_, rows) in runs.items():
        for row in rows:
            for name in row:
                drawn = name in CURVES or (name.startswith("eval/") and name.count("/") == 1)
                if drawn and not name.endswith(("_low", "_high")):
                    lines.setdefault((row["stage"], name), {}).setdefault(run, []).append((row["step"], row[name]))
    by_run = {run: colours[i % len(colours)] for i, run in enumerate(runs)}
    figures = []
    for (stage, name), own in lines.items():
        own = {run: line for run, line in own.items() if any(value is not None for _, value in line)}
        figures.append(f"<figure><figcaption>{html.escape(f'{stage}: {name}')}</figcaption>{chart.draw(own, by_run)}</figure>")
    key = "".join(f'<span><i style="background: {colour}"></i>{html.escape(run)}</span>' for run, colour in by_run.items())
    return [f'<p class="key">{key}</p><div class="charts">{"".join(figures)}</div>']
