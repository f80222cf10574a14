"""The page of a study, WORKDIR/study.html: the verdict, a table of the arms, their curves (mean and band over seeds), and
samples. It is self-contained, has no script, and escapes what models and recipes say.
"""

import html
import statistics
from collections.abc import Mapping, Sequence

from etils import epath

from jaxpost.reporting import chart, compare, page, table
from jaxpost.reporting.writers import METRICS, SAMPLES, read_rows, replace
from jaxpost.studies.results import effect
from jaxpost.studies.runs import Row

SAMPLES_SHOWN = 4  # of each arm


def write(path: epath.Path, content: Mapping, rows: Mapping[str, Mapping[int, Row]], metrics: Sequence[str]) -> None:
    """Writes the page of a scored study: its results file's content, the runs of {arm: {seed: Row}}, and its figures' names."""
    colours = {arm: page.COLOURS[i % len(page.COLOURS)] for i, arm in enumerate(rows)}
    body = [
        f"<h1>{html.escape(content['title'])}</h1>",
        f"<p><b>{html.escape(content['verdict'])}</b></p>",
        _verdicts(content["lines"]),
        _arms(rows, metrics, colours),
        f'<div class="charts">{"".join(_curves(rows, colours))}</div>',
        "<h2>Samples</h2>",
        *_samples(rows),
    ]
    replace(path, page.whole(content["title"], "\n".join(body)).encode(errors="replace"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _verdicts(lines: Sequence[Mapping]) -> str:
    cells = [[html.escape(line["claim"]), html.escape(effect(line)), html.escape(line["verdict"])] for line in lines]
    return _table(("claim", "effect (95% interval)", "verdict"), cells)


def _arms(rows: Mapping[str, Mapping[int, Row]], metrics: Sequence[str], colours: Mapping[str, str]) -> str:
    lines = []
    for arm, by_seed in rows.items():
        figures = [[row.figures.get(name) for row in by_seed.values()] for name in metrics]
        spent = [sum(row.spent[kind] for kind in ("learned", "generated", "scored")) for row in by_seed.values()]
        settings = ", ".join(f"{path}={value}" for path, value in next(iter(by_seed.values())).changes.items())
        cells = [compare.spread([x for x in values if x is not None]) for values in figures]
        lines.append(
            [page.mark(colours[arm]) + html.escape(arm), *cells, f"{statistics.mean(spent):,.0f}", html.escape(settings)]
        )
    return _table(("arm", *metrics, "tokens", "tuned"), lines)


def _curves(rows: Mapping[str, Mapping[int, Row]], colours: Mapping[str, str]) -> list[str]:
    """A chart for each stage and metric: the mean over an arm's seeds, and from its lowest to its highest."""
    curves: dict = {}
    for arm, by_seed in rows.items():
        for row in by_seed.values():
            for line in read_rows(epath.Path(row.workdir) / METRICS):
                for name, value in line.items():
                    if compare.is_drawn(name) and value is not None:
                        steps = curves.setdefault((line["stage"], name), {}).setdefault(arm, {})
                        steps.setdefault(line["step"], []).append(value)
    drawings = []
    for (stage, name), arms in curves.items():
        complete = {
            arm: {step: values for step, values in steps.items() if len(values) == len(rows[arm])}
            for arm, steps in arms.items()
        }
        lines = {
            arm: sorted((s, statistics.mean(v)) for s, v in steps.items()) for arm, steps in complete.items() if len(steps) > 1
        }
        bands = {arm: sorted((s, min(v), max(v)) for s, v in complete[arm].items()) for arm in lines}
        if lines:
            caption = f"<figcaption>{html.escape(f'{stage}: {name}')}</figcaption>"
            drawings.append(f"<figure>{caption}{chart.draw(lines, colours, bands)}</figure>")
    return drawings


def _samples(rows: Mapping[str, Mapping[int, Row]]) -> list[str]:
    parts = []
    for arm, by_seed in rows.items():
        samples = [row for row in read_rows(epath.Path(next(iter(by_seed.values())).workdir) / SAMPLES) if "completion" in row]
        if samples:
            cells = [
                [
                    html.escape(table.plain(row.get("prompt", ""))),
                    html.escape(str(row["completion"])),
                    f"{row.get('reward', '')}",
                ]
                for row in samples[-SAMPLES_SHOWN:]
            ]
            parts += [f"<h3>{html.escape(arm)}</h3>", _table(("prompt", "completion", "reward"), cells)]
    return parts
