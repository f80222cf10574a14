"""Several runs on one page: a table of their differing settings and final figures, and charts of their curves together.

    python -m jaxpost.report runs/*

prints the table and writes compare.html. Runs that only differ by `seed` are one line of the table: the mean and the sample
standard deviation (n - 1) over their seeds.
"""

import html
import json
import math
import statistics

from jaxpost.errors import UserError
from jaxpost.recipe import flat
from jaxpost.reporting import chart, page
from jaxpost.reporting.writers import METRICS, read_rows
from jaxpost.storage import cloud
from jaxpost.storage.host import read_object

FIGURES = ("eval/accuracy", "eval/accuracy_greedy", "eval/reward", "eval/reward_greedy", "eval/loss")  # of the table
CURVES = ("loss", "reward", "grad_norm", "entropy", "kl")  # drawn besides the figures of evaluations, without their cells


def read(workdirs) -> dict[str, tuple[dict, list[dict]]]:
    """{folder: (its settings by path, its rows of metrics)}. Raises UserError for a folder without a run."""
    runs = {}
    for workdir in map(cloud.path, workdirs):
        if not (workdir / "config.json").exists() or not (workdir / METRICS).exists():
            raise UserError(f"{workdir}: no run is there (config.json and {METRICS}); give the workdirs of runs.")
        runs[str(workdir)] = flat(read_object(workdir / "config.json")), read_rows(workdir / METRICS)
    return runs


def groups(runs: dict) -> tuple[list[str], dict[tuple, list[str]]]:
    """(the settings that differ, without seeds, {their values as texts: the runs that have them})."""
    keys = {key for settings, _ in runs.values() for key in settings if key.rpartition(".")[2] != "seed"}
    differ = sorted(k for k in keys if len({json.dumps(settings.get(k)) for settings, _ in runs.values()}) > 1)
    members: dict = {}
    for name, (settings, _) in runs.items():
        members.setdefault(tuple(json.dumps(settings.get(k, "-")).strip('"') for k in differ), []).append(name)
    return differ, members


def figures(runs: dict) -> dict[str, dict[str, float]]:
    """{figure: {run: its last value}} of the table's figures, the one that ranks the runs first."""
    finals = {run: _final(settings, rows) for run, (settings, rows) in runs.items()}
    by_name = {
        name: {run: final[name] for run, final in finals.items() if final.get(name) is not None} for name in (*FIGURES, "loss")
    }
    by_name = {name: values for name, values in by_name.items() if values}
    if len(by_name) > 1:
        by_name.pop("loss", None)
    for kind in ("", "_greedy"):  # a verifier's reward is its accuracy
        if by_name.get(f"eval/reward{kind}") == by_name.get(f"eval/accuracy{kind}"):
            by_name.pop(f"eval/reward{kind}", None)
    return by_name


def table(runs: dict) -> list[list[str]]:
    """The head and the rows of the comparison: the runs' names, the settings that differ, their final figures."""
    (differ, members), last = groups(runs), figures(runs)
    lines = [["runs", *differ, "seeds", *last]]
    for values, names in members.items():
        spreads = [spread([figure[name] for name in names if name in figure]) for figure in last.values()]
        lines.append([" ".join(names), *values, str(len(names)), *spreads])
    return lines


def result(runs: dict) -> str:
    """One sentence: which settings have the best figure, by how much, and whether that exceeds the spread over seeds."""
    (differ, members), last = groups(runs), figures(runs)
    if not last:
        return "No run has a figure yet."
    name, final = next(iter(last.items()))
    each = {values: [final[run] for run in names if run in final] for values, names in members.items()}
    sign = -1 if name.endswith("loss") else 1
    order = sorted((values for values in each if each[values]), key=lambda v: -sign * statistics.mean(each[v]))
    described = [(spread(each[v]), ", ".join(f"{k}={x}" for k, x in zip(differ, v, strict=True))) for v in order]
    if len(order) == 1:
        return f"{name} is {described[0][0]}" + (f" over {len(each[order[0]])} seeds." if len(each[order[0]]) > 1 else ".")
    gap = abs(statistics.mean(each[order[0]]) - statistics.mean(each[order[1]]))
    spreads = [statistics.stdev(each[v]) for v in order[:2] if len(each[v]) > 1]
    doubt = "; these have one seed each, so it may be chance" if not spreads else ""
    doubt = "; the difference is within the spread over seeds" if spreads and gap <= max(spreads) else doubt
    return f"{name} is best with {described[0][1]}: {described[0][0]}, against {described[1][0]} with {described[1][1]}{doubt}."


def _final(settings: dict, rows: list[dict]) -> dict:
    """The last value of each figure in the run's result stage."""
    stage = settings.get("result") or (rows[-1]["stage"] if rows else "")
    return {name: row[name] for row in rows if row["stage"] == stage for name in (*FIGURES, "loss") if name in row}


def spread(values: list[float]) -> str:
    """The mean and the spread over seeds, to two digits of the spread."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    if not deviation or not math.isfinite(deviation):
        return f"{statistics.mean(values):.4g}{' ± 0' if len(values) > 1 else ''}" if values else "-"
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def colours(runs: dict, palette) -> dict[str, str]:
    """{run: colour}. Runs with the same settings share one; where only seeds differ, each run has its own."""
    _, members = groups(runs)
    each = members.values() if len(members) > 1 else [[run] for run in runs]
    return {run: palette[i % len(palette)] for i, names in enumerate(each) for run in names}


def is_drawn(name: str) -> bool:
    """Whether a figure has a chart: some of training, and those of evaluations without their cells and bounds."""
    of_eval = name.startswith("eval/") and name.count("/") == 1
    return (name in CURVES or of_eval) and not name.endswith(("_low", "_high", "_se"))


def curves(runs: dict, by_run: dict) -> list[str]:
    """A chart for each stage and metric with the curves of all runs; by_run: of `colours`. Metrics that are zero in all runs
    and rewards that equal the accuracy have none.
    """
    lines: dict = {}
    for run, (_, rows) in runs.items():
        for row in rows:
            for name in row:
                if is_drawn(name):
                    lines.setdefault((row["stage"], name), {}).setdefault(run, []).append((row["step"], row[name]))
    drawings = []
    for (stage, name), line_of in lines.items():
        same = name.startswith("eval/reward") and line_of == lines.get((stage, name.replace("reward", "accuracy")))
        line_of = {run: line for run, line in line_of.items() if any(value is not None for _, value in line)}
        if not same and any(value for line in line_of.values() for _, value in line):
            drawing = chart.draw(line_of, by_run)
            drawings.append(f"<figure><figcaption>{html.escape(f'{stage}: {name}')}</figcaption>{drawing}</figure>")
    return [f'<p class="key">{_key(runs, by_run)}</p><div class="charts">{"".join(drawings)}</div>']


def _key(runs: dict, by_run: dict) -> str:
    differ, members = groups(runs)
    named = {names[0]: ", ".join(f"{k}={x}" for k, x in zip(differ, values, strict=True)) for values, names in members.items()}
    labels = named if len(members) > 1 else {run: run for run in runs}
    return "".join(f"<span>{page.mark(by_run[run])}{html.escape(text)}</span>" for run, text in labels.items())
