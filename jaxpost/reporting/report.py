"""The report: everything that a run wrote to its workdir, as one self-contained HTML file.

    python -m jaxpost.report --workdir=/tmp/run
    python -m jaxpost.report runs/*                  several runs compared (compare.py)

It reads metrics.jsonl, samples.jsonl, config.json and environment.json, where they exist, and writes report.html beside them;
the run may still be going. The page has each stage's accuracy first (or its reward), then cells, curves of every metric,
samples, config and environment. There is no script, nothing is fetched, and texts of models and configs are escaped.
"""

import datetime
import html
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from etils import epath

from jaxpost.errors import UserError
from jaxpost.reporting import chart, compare, page, progress, table
from jaxpost.reporting.writers import METRICS, SAMPLES, read_rows
from jaxpost.storage import cloud
from jaxpost.storage.host import read_object

_ROW_NAMES = ("stage", "step", "time")
_BOUNDS = ("_low", "_high")  # the suffixes of an interval's bounds
_UNCERTAINTY = (*_BOUNDS, "_se")
_PACKAGES = ("jaxpost", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "libtpu")


def write(workdir, out=None):
    """Writes the report on the run in `workdir` to `out`, or to report.html in the work folder; returns the path written.

    Raises UserError when `workdir` is not a folder or one of its files cannot be read.
    """
    workdir = cloud.path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder; give the --workdir of a run")
    metrics, samples = read_rows(workdir / METRICS), read_rows(workdir / SAMPLES)
    config, environment_ = _read_json(workdir / "config.json"), _read_json(workdir / "environment.json")
    stages = list(dict.fromkeys(row["stage"] for row in metrics + samples))
    colours = {stage: page.COLOURS[number % len(page.COLOURS)] for number, stage in enumerate(stages)}
    title = f"jaxpost run: {workdir.name}"
    body = [
        f"<h1>{_escape(title)}</h1>",
        _result(metrics, stages, config),
        _summary(metrics, stages, environment_),
        _headline(metrics, stages),
        _cells(metrics, stages),
        _curves(metrics, colours),
        _samples(samples, stages),
        _config(config),
        _environment(environment_),
    ]
    path = cloud.path(out) if out else workdir / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page.whole(title, "\n".join(filter(None, body))).encode(errors="replace"))
    return path


def comparison(workdirs, out="compare.html"):
    """Writes the page that compares several runs; returns (its path, the table of settings and final figures as text)."""
    runs = compare.read(workdirs)
    head, *rows = compare.table(runs)
    wide = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    text = "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, wide, strict=True)).rstrip() for row in (head, *rows))
    by_run = compare.colours(runs, page.COLOURS)
    marks = [page.mark(by_run[names[0]]) for names in compare.groups(runs)[1].values()] if len(rows) > 1 else [""]
    drawn = [
        f"<tr>{''.join(f'<td>{mark * (not i)}{_escape(cell)}</td>' for i, cell in enumerate(row))}</tr>"
        for mark, row in zip(marks, rows, strict=True)
    ]
    top = f"<tr>{''.join(f'<th>{_escape(cell)}</th>' for cell in head)}</tr>"
    result = f"<p><b>{_escape(compare.result(runs))}</b></p>"
    body = ["<h1>jaxpost runs</h1>", result, _table(top, drawn), *compare.curves(runs, by_run)]
    path = cloud.path(out)
    path.write_bytes(page.whole("jaxpost runs", "".join(body)).encode(errors="replace"))
    return path, text


def summary(workdir):
    """The run in a few lines of text: accuracy before and after each stage, sampled and greedy, cell by cell.

    Each stage's last sampled completions follow. Empty for a run that measured neither accuracy nor reward.
    """
    metrics, samples = (read_rows(epath.Path(workdir) / name) for name in (METRICS, SAMPLES))
    names = sampled, _ = _graded(metrics)
    stages = list(dict.fromkeys(row["stage"] for row in metrics if sampled in row))
    cells = dict.fromkeys(f"/{cell}" for _, cell in _measured_cells(metrics, sampled))
    if not stages:
        return ""

    def figures(stage, cell, end):
        pair = (_ends(metrics, stage, name + cell)[end] for name in names)
        pattern = "{:.0%}" if "accuracy" in sampled else "{:.2g}"
        return " ".join(f"{'-' if value is None else pattern.format(value).rstrip('%'):>4}" for value in pair)

    what = "accuracy in percent" if "accuracy" in sampled else "reward"
    lines = [f"held-out {what}, sampled at temperature 1 and greedy, before and after each stage"]
    lines.append(f"{'cell':5}" + "".join(f" | {stage:^23}" for stage in stages))
    for cell in ("", *cells):
        ends = "".join(f" | {figures(stage, cell, 0)}  -> {figures(stage, cell, 1)}" for stage in stages)
        lines.append(f"{cell.lstrip('/') or 'all':5}{ends}")
    for stage in stages:
        shown = [row for row in samples if row["stage"] == stage and row.get("kind") == "sampled" and "eval" not in row][-5:]
        answers = [f" (answer {row['answer']})" if row["answer"] else "" for row in shown]
        lines += [f"{stage}: {table.plain(r['prompt'])} -> {r['completion']}{w}" for r, w in zip(shown, answers, strict=True)]
    return "\n".join(lines)


def change(workdir, stage):
    """One line, `sft: eval/accuracy 0% -> 56%`: a stage's first and last accuracy, else reward, else loss; or ""."""
    metrics = [row for row in read_rows(epath.Path(workdir) / METRICS) if row["stage"] == stage]
    for name in (_graded(metrics)[0], "eval/loss"):
        ends = _ends(metrics, stage, name)
        if None not in ends:
            return f"{stage}: {name} {' -> '.join(progress.figure(name, value) for value in ends)}"
    return ""


def environment():
    """The environment of a run as a dict for JSON: interpreter, machine, devices, packages, date, git commit."""
    import jax

    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": jax.process_count(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
        **({"commit": commit} if (commit := _commit()) else {}),
    }


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit():
    """The commit of this file's checkout, with "-dirty" after it where files were changed; None outside of a checkout."""
    root = Path(__file__).resolve().parents[2]
    # An installed package may be inside another project's checkout, whose commit means nothing here.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _read_json(path):
    try:
        return read_object(path) if path.exists() else None
    except UserError as error:
        raise UserError(f"{error} Remove it, and the report will go without it") from error


def _escape(value):
    return html.escape(str(value))


def _graded(metrics):
    """The names of the main figures, sampled and greedy: accuracies, or rewards in a run that only has those."""
    kind = "accuracy" if any(name.startswith("eval/accuracy") for row in metrics for name in row) else "reward"
    return f"eval/{kind}", f"eval/{kind}_greedy"


def _figure(name, value, sign=""):
    """An accuracy in percent (with a sign, in points), a reward as it is."""
    if value is None:
        return "&ndash;"
    if "accuracy" not in name:
        return f"{value:{sign}.3g}"
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}%"


def _ends(metrics, stage, name):
    """(before, after): the first and the last finite value of a metric in a stage, None where there is none.

    A single value is from before the stage if it was taken at step 0, else from after it.
    """
    points = [(row["step"], row[name]) for row in metrics if row["stage"] == stage and row.get(name) is not None]
    if len(points) == 1:
        step, value = points[0]
        return (value, None) if step == 0 else (None, value)
    return (points[0][1], points[-1][1]) if points else (None, None)


def _table(head, rows):
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _result(metrics, stages, config):
    """One sentence: the run's result and its first value."""
    for name in (*_graded(metrics)[:1], "eval/loss", "loss"):
        measured = [stage for stage in stages if any(row.get(name) is not None for row in metrics if row["stage"] == stage)]
        if not measured:
            continue
        named = (config or {}).get("result")
        last = named if named in measured else measured[-1]
        first = next(row for row in metrics if row.get(name) is not None and row["stage"] == measured[0])
        final = [row for row in metrics if row.get(name) is not None and row["stage"] == last][-1]
        low, high = final.get(f"{name}_low"), final.get(f"{name}_high")
        interval = "" if low is None or high is None else f" (95% interval {_figure(name, low)} to {_figure(name, high)})"
        what = {"eval/loss": "held-out loss", "loss": "training loss"}.get(name, f"held-out {name[5:]}, sampled,")
        before = "" if final is first else f", from {_figure(name, first[name])} at {measured[0]} step {first['step']}"
        after = f"{_figure(name, final[name])}{interval} after {last} step {final['step']}{before}"
        return f"<p><b>{_escape(f'The {what} is {after}.')}</b></p>"
    return ""


def _summary(metrics, stages, environment_):
    parts = [f"{len(stages)} stage{'' if len(stages) == 1 else 's'}" + (f": {', '.join(stages)}" if stages else "")]
    if metrics:
        parts.append(f"{metrics[-1]['time']:.0f} s")
    parts += [str(environment_[key]) for key in ("devices", "date") if key in (environment_ or {})]
    return f'<p class="note">{_escape(" · ".join(parts))}</p>'


def _headline(metrics, stages):
    """One row a stage: steps, seconds, and the accuracy (or reward) before and after it, sampled and greedy."""
    if not metrics:
        return '<p class="note">No metrics have been written yet.</p>'
    named = list(zip(("sampled", "greedy"), _graded(metrics), strict=True))
    what = named[0][1].removeprefix("eval/")
    named = [(label, name) for label, name in named if any(name in row for row in metrics)]
    over = "".join(f'<th colspan="3" class="stage">{what}, {label}</th>' for label, _ in named)
    under = '<th class="open">before</th><th>after</th><th>change</th>' * len(named)
    head = f"<tr><th></th><th></th><th></th>{over}</tr><tr><th>stage</th><th>steps</th><th>seconds</th>{under}</tr>"
    rows, ended = [], 0.0
    for stage in [stage for stage in stages if any(row["stage"] == stage for row in metrics)]:
        mine = [row for row in metrics if row["stage"] == stage]
        cells = f"<td>{_escape(stage)}</td><td>{max(row['step'] for row in mine)}</td><td>{mine[-1]['time'] - ended:.0f}</td>"
        ended = mine[-1]["time"]
        for _, name in named:
            before, after = _ends(metrics, stage, name)
            change = _figure(name, None if before is None or after is None else after - before, "+")
            cells += (
                f'<td class="open">{_figure(name, before)}</td><td class="best">{_figure(name, after)}</td><td>{change}</td>'
            )
        rows.append(f"<tr>{cells}</tr>")
    points = "; the change is in percentage points" if what == "accuracy" else ""
    note = f'<p class="note">On held-out problems{points}.</p>' if named else ""
    return f"<h2>Stages</h2>{note}{_table(head, rows)}"


def _measured_cells(metrics, name):
    """(stage, cell) of each of a figure's cells in each stage, in order, without interval bounds."""
    keys = [(row["stage"], key) for row in metrics for key in row if key.startswith(f"{name}/")]
    return list(dict.fromkeys((stage, key.removeprefix(f"{name}/")) for stage, key in keys if not key.endswith(_UNCERTAINTY)))


def _cells(metrics, stages):
    """One row a cell, two columns a stage: its first and its last evaluation, sampled and greedy."""
    names = _graded(metrics)
    measured_cells = _measured_cells(metrics, names[0])
    if not measured_cells:
        return ""
    cells = dict.fromkeys(cell for _, cell in measured_cells)
    measured = [stage for stage in stages if any(stage == holder for holder, _ in measured_cells)]
    head = "<tr><th></th>" + "".join(f'<th colspan="2" class="stage">{_escape(stage)}</th>' for stage in measured)
    head += "</tr><tr><th>cell</th>" + '<th class="open">before</th><th>after</th>' * len(measured) + "</tr>"
    rows = []
    for cell in cells:
        row = f"<td>{_escape(cell)}</td>"
        for stage in measured:
            sampled, greedy = (_ends(metrics, stage, f"{name}/{cell}") for name in names)
            for end, style in ((0, "open"), (1, "")):
                shade = f' style="background: rgba(47, 138, 78, {0.45 * sampled[end]:.2f})"' if (sampled[end] or 0) > 0 else ""
                beside = f" <small>{_figure(names[1], greedy[end])}</small>" if greedy[end] is not None else ""
                bounds = [_ends(metrics, stage, f"{names[0]}/{cell}{bound}")[end] for bound in _BOUNDS]
                interval = "" if None in bounds else " to ".join(_figure(names[0], bound) for bound in bounds)
                shade += f' title="95% interval {interval}"' if interval else ""
                row += f'<td class="{style}"{shade}>{_figure(names[0], sampled[end])}{beside}</td>'
        rows.append(f"<tr>{row}</tr>")
    note = (
        f"A cell is one kind of the task's problems, as +2 may be sums of two digits. Sampled {names[0][5:]}, with greedy "
        "decoding in grey beside it, at a stage's first and last evaluation; the greener, the more are solved."
    )
    note += " Of few problems a cell says little: pointing at it shows the 95% interval." if "title=" in "".join(rows) else ""
    return f'<h2>Cells</h2><p class="note">{note}</p>{_table(head, rows)}'


def _curves(metrics, colours):
    """A chart for each metric of each stage, evaluations first; metrics that were always zero have none."""
    parts = []
    for stage, colour in colours.items():
        lines = {}
        for row in metrics:
            for name in row if row["stage"] == stage else ():
                if name not in _ROW_NAMES and not name.endswith(_UNCERTAINTY):
                    lines.setdefault(name, []).append((row["step"], row[name]))
        for kind in ("", "_greedy"):  # a verifier's reward is its accuracy
            if lines.get(f"eval/reward{kind}") == lines.get(f"eval/accuracy{kind}"):
                lines.pop(f"eval/reward{kind}", None)
        charts = "".join(
            f"<figure><figcaption>{_escape(name)}</figcaption>{_chart(stage, line, colours)}</figure>"
            for name, line in sorted(lines.items(), key=lambda item: (not item[0].startswith("eval/"), item[0].count("/")))
            if any(value != 0 for _, value in line)
        )
        if charts:
            head = f'<h3><span style="color: {colour}">{_escape(stage)}</span></h3>'
            parts.append(f'{head}<div class="charts">{charts}</div>')
    return "\n".join(["<h2>Curves</h2>", '<p class="note">Over the steps of each stage.</p>', *parts]) if parts else ""


def _chart(stage, line, colours):
    return chart.draw({stage: line} if any(value is not None for _, value in line) else {}, colours)


def _samples(samples, stages, each=6):
    """Answers to test problems before and after each stage, side by side; then its other completions, first and last."""
    if not samples:
        return ""
    rows, others = [], []
    for stage in stages:
        mine = [row for row in samples if row["stage"] == stage]
        evaluated = [row for row in mine if "kind" in row]
        ends = (
            [[row for row in evaluated if row["step"] == step] for step in (evaluated[0]["step"], evaluated[-1]["step"])]
            if evaluated
            else [[], []]
        )
        after = {(row.get("eval"), row["kind"], table.plain(row["prompt"])): row for row in ends[1]}
        for row in ends[0]:
            last = after.get((row.get("eval"), row["kind"], table.plain(row["prompt"])), {})
            cells = [(name, row.get(name)) for name in ("stage", "kind", "prompt", "answer", "completion", "reward")]
            cells += [(name, last.get(name)) for name in ("completion", "reward")]
            rows.append("<tr>" + "".join(_sample_cell(*cell) for cell in cells) + "</tr>")
        rest = [row for row in mine if "kind" not in row]
        others += rest if len(rest) <= 2 * each else rest[:each] + rest[-each:]
    names = ("stage", "kind", "prompt", "answer", "before", "reward", "after", "reward")
    head = "<tr>" + "".join(f'<th class="text">{name}</th>' for name in names) + "</tr>"
    note = '<p class="note">The first test problem of each cell, at a stage\'s first and last evaluation.</p>'
    parts = ["<h2>Samples</h2>", note + _table(head, rows) if rows else ""]
    if others:
        names = table.columns(others)
        head = "<tr>" + "".join(f'<th class="text">{_escape(name)}</th>' for name in names) + "</tr>"
        drawn = ["<tr>" + "".join(_sample_cell(name, row.get(name)) for name in names) + "</tr>" for row in others]
        parts.append(
            f'<p class="note">Completions that were learned from: each stage\'s first and last.</p>{_table(head, drawn)}'
        )
    return "".join(parts)


def _sample_cell(name, value):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        tint = ' class="better"' if value > 0 else ' class="worse"' if value < 0 else ""
        return f"<td{tint if name == 'advantage' else ''}>{chart.label(value)}</td>"
    return f'<td class="text">{"" if value is None else _escape(table.plain(value))}</td>'


def _config(config):
    if config is None:
        return ""
    return f"<h2>Config</h2><details><summary>config.json</summary><pre>{_escape(json.dumps(config, indent=2))}</pre></details>"


def _environment(environment_):
    if not environment_:
        return ""
    rows = [f'<tr><td>{_escape(key)}</td><td class="text">{_escape(value)}</td></tr>' for key, value in environment_.items()]
    return f"<h2>Environment</h2>{_table('', rows)}"
