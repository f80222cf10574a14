"""What a run leaves behind: rows that survive a restart exactly, event files that TensorBoard reads, a report that is safe."""

import html.parser
import json
import math
import re
import sys
import types

import numpy as np
import pytest

from jaxpost.errors import UserError
from jaxpost.reporting import chart, compare, report, table, writers
from jaxpost.reporting.page import COLOURS
from jaxpost.storage import cloud

STAGES = ["sft", "reinforce"]


def write_run(workdir, rows):
    writer = writers.MetricWriter(workdir, {"seed": 0}, STAGES)
    for stage, step, values in rows:
        writer.write(stage, step, values)
        writer.samples(stage, step, [{"prompt": "1+1", "completion": str(step), "reward": 1.0}])
    writer.close()


def places(path):
    return [(row["stage"], row["step"]) for row in writers.read_rows(path)]


def scalars(workdir, stage, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir / "tensorboard" / stage))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


TWO_STAGES = [(stage, step, {"loss": 10.0 - step, "eval/accuracy": step / 8}) for stage in STAGES for step in (0, 2, 4)]


def test_rows_are_written_as_they_come_with_null_for_what_is_not_finite(tmp_path):
    writer = writers.MetricWriter(tmp_path, {}, STAGES)
    writer.write("sft", np.int64(3), {"loss": np.float32(0.5), "kl": float("nan"), "ratio": math.inf})
    writer.samples("sft", 3, [{"prompt": "1+1", "completion": 'a "b"\n', "reward": float("nan"), "step": 99}])
    # Before close: a run that is killed has what it wrote.
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row.pop("time") >= 0
    assert row == {"stage": "sft", "step": 3, "loss": 0.5, "kl": None, "ratio": None}
    assert writers.read_rows(tmp_path / "samples.jsonl") == [
        {"prompt": "1+1", "completion": 'a "b"\n', "reward": None, "step": 3, "stage": "sft"}
    ]
    with pytest.raises(UserError, match="metric 'step' of stage 'sft'"):
        writer.write("sft", 4, {"step": 1.0})
    writer.close()


def test_time_goes_on_where_an_earlier_process_stopped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "time": 1000.0}\n')
    write_run(tmp_path, [("sft", 2, {"loss": 1.0})])
    assert 1000.0 <= writers.read_rows(tmp_path / "metrics.jsonl")[1]["time"] < 1060.0


@pytest.mark.parametrize("torn", [b'{"stage": "reinforce", "step": 6, "lo', b'{"stage": "sft", "step": 2, "text": "\xc3'])
def test_cut_back_keeps_earlier_rows_byte_for_byte(tmp_path, torn):
    write_run(tmp_path, TWO_STAGES)
    before = {name: (tmp_path / name).read_bytes().splitlines(keepends=True) for name in ("metrics.jsonl", "samples.jsonl")}
    for name in before:
        with open(tmp_path / name, "ab") as file:
            file.write(torn)
    writers.cut_back(tmp_path, STAGES, "reinforce", 2)
    for name, lines in before.items():
        assert (tmp_path / name).read_bytes() == b"".join(lines[:5])
    writers.cut_back(tmp_path, STAGES, "sft", 3)
    for name, lines in before.items():
        assert (tmp_path / name).read_bytes() == b"".join(lines[:2])
    assert not (tmp_path / "tensorboard" / "reinforce").exists()
    writers.cut_back(tmp_path, STAGES, "sft", -1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl", "tensorboard"]


def test_cut_back_ends_a_whole_last_line_and_refuses_a_broken_one_inside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 1, "time": 0}\n{"stage": "sft", "step": 2, "time": 0}')
    writers.cut_back(tmp_path, STAGES, "sft", 2)
    assert path.read_text() == '{"stage": "sft", "step": 1, "time": 0}\n{"stage": "sft", "step": 2, "time": 0}\n'
    path.write_text('{"stage": "sft", "step": 1, "time": 0}\n[]\n{"stage": "sft", "step": 2, "time": 0}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a JSON line .* remove this line"):
        writers.cut_back(tmp_path, STAGES, "sft", 2)
    with pytest.raises(UserError, match="stage 'dpo': not one of this run's stages"):
        writers.cut_back(tmp_path, STAGES, "dpo", 2)


def test_a_cells_interval_is_shown_with_it_and_is_no_cell(tmp_path):
    figures = {"eval/accuracy": 0.5, "eval/accuracy/+1": 0.5, "eval/accuracy/+1_low": 0.2, "eval/accuracy/+1_high": 0.8}
    write_run(tmp_path, [("sft", 0, figures), ("sft", 4, figures)])
    page = report.write(tmp_path).read_text()
    assert page.count('title="95% interval 20.0% to 80.0%"') == 2 and "+1_low" not in page
    assert "+1_low" not in report.summary(tmp_path)


def test_prompts_that_are_messages_are_shown_as_their_text(tmp_path):
    asked = [{"role": "user", "content": "1+1"}]
    writer = writers.MetricWriter(tmp_path, {}, STAGES)
    for step in (0, 2):
        writer.write("sft", step, {"eval/reward": 0.5})
        row = {"prompt": asked, "completion": str(step), "reward": 1.0, "answer": "2", "kind": "sampled"}
        writer.samples("sft", step, [row])
    writer.close()
    page = report.write(tmp_path).read_text()
    assert (
        "user: 1+1" in page
        and "{" not in page.partition("</style>")[2]
        and "sft: user: 1+1 -> 2 (answer 2)" in report.summary(tmp_path)
    )


def test_tensorboard_reads_the_events_and_has_none_twice_after_a_restart(tmp_path):
    write_run(tmp_path, TWO_STAGES)
    assert scalars(tmp_path, "reinforce", "loss") == [(0, 10.0), (2, 8.0), (4, 6.0)]
    for step in (3, 2):
        writers.cut_back(tmp_path, STAGES, "reinforce", step)
        # Read before anything is written anew: the cut itself must be enough.
        assert scalars(tmp_path, "reinforce", "loss") == [(0, 10.0), (2, 8.0)]
    assert scalars(tmp_path, "sft", "eval/accuracy") == [(0, 0.0), (2, 0.25), (4, 0.5)]
    write_run(tmp_path, [("reinforce", 3, {"loss": 7.5})])
    assert scalars(tmp_path, "reinforce", "loss") == [(0, 10.0), (2, 8.0), (3, 7.5)]


def test_without_tensorboard_the_rows_are_still_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    write_run(tmp_path, TWO_STAGES)
    writers.cut_back(tmp_path, STAGES, "reinforce", 0)
    assert places(tmp_path / "metrics.jsonl") == [("sft", 0), ("sft", 2), ("sft", 4), ("reinforce", 0)]
    assert not (tmp_path / "tensorboard").exists()


def test_a_remote_folder_gets_the_same_files_by_copying(tmp_path, monkeypatch):
    monkeypatch.setattr(cloud, "is_remote", lambda path: True)
    write_run(tmp_path, TWO_STAGES[:2])
    writer = writers.MetricWriter(tmp_path, {}, STAGES)
    writer.write("sft", 4, {"loss": 6.0})
    assert places(tmp_path / "metrics.jsonl") == [("sft", 0), ("sft", 2)]
    writer.flush()
    assert places(tmp_path / "metrics.jsonl") == [("sft", 0), ("sft", 2), ("sft", 4)]
    writer.close()
    assert scalars(tmp_path, "sft", "loss") == [(0, 10.0), (2, 8.0), (4, 6.0)]
    assert places(tmp_path / "samples.jsonl") == [("sft", 0), ("sft", 2)]


def test_weights_and_biases_gets_each_stage_under_its_own_step(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        define_metric=lambda name, step_metric=None: calls.append((name, step_metric)),
        log=calls.append,
        finish=lambda: calls.append("finish"),
    )
    fake = types.SimpleNamespace(init=lambda **arguments: calls.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    write_run(tmp_path, [("sft", 0, {"loss": 3.0})])
    assert calls == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_run(tmp_path, [("sft", 1, {"loss": 2.0})])
    assert calls[0]["config"] == {"seed": 0} and calls[0]["resume"] == "allow"
    assert calls[1:3] == [("sft/step", None), ("sft/*", "sft/step")]
    assert calls[5:] == [{"sft/step": 1, "sft/loss": 2.0}, "finish"]
    write_run(tmp_path, [("sft", 2, {"loss": 1.0})])
    assert calls[7]["id"] == calls[0]["id"]


class Outline(html.parser.HTMLParser):
    """Collects a page's tags, the rows of its tables as text, and everything that could load or run something."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.rows, self.active, self._open = set(), [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.active += [(name, value) for name, value in attributes if name in ("src", "href") or name.startswith("on")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data


def test_the_report_has_accuracies_curves_and_samples_by_stage(tmp_path):
    rows = [
        ("sft", step, {"eval/accuracy": a, "eval/accuracy/+2": a, "eval/accuracy_greedy": g, "eval/accuracy_greedy/+2": g})
        for step, a, g in [(0, 0.01, 0.02), (400, 0.41, 0.5)]
    ]
    rows += [("reinforce", 300, {"eval/accuracy": 0.66, "eval/accuracy/+2": 0.7, "train/loss": 0.125})]
    write_run(tmp_path, rows)
    path = report.write(tmp_path)
    assert str(path) == str(tmp_path / "report.html")
    page = Outline(path.read_text())
    stages = [[*row[:2], *row[3:]] for row in page.rows if row[0] in STAGES and len(row) == 9]
    assert stages == [
        ["sft", "400", "1.0%", "41.0%", "+40.0", "2.0%", "50.0%", "+48.0"],
        ["reinforce", "300", "–", "66.0%", "–", "–", "–", "–"],
    ]
    assert ["+2", "1.0% 2.0%", "41.0% 50.0%", "–", "70.0%"] in page.rows
    assert ["sft", "400", "1+1", "400", "1"] in page.rows
    assert page.active == [] and not page.tags & {"script", "link", "img", "iframe"}


def test_the_summary_has_a_line_a_cell_with_both_ends_of_each_stage(tmp_path):
    rows = [
        {"stage": "sft", "step": 0, "time": 1, "eval/accuracy": 0.0, "eval/accuracy_greedy": 0.01, "eval/accuracy/+2": 0.02},
        {"stage": "sft", "step": 9, "time": 2, "eval/accuracy": 0.5, "eval/accuracy_greedy": 0.9, "eval/accuracy/+2": 1.0},
        {"stage": "rl", "step": 0, "time": 3, "eval/accuracy": 0.4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"stage": "sft", "step": 9, "kind": "sampled", "prompt": "1+1", "completion": "3", "answer": "2"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n" + json.dumps({**sample, "kind": "greedy"}) + "\n")
    _, _, overall, cell, shown = report.summary(tmp_path).splitlines()
    assert overall.split() == ["all", "|", "0", "1", "->", "50", "90", "|", "40", "-", "->", "-", "-"]
    assert cell.split() == ["+2", "|", "2", "-", "->", "100", "-", "|", "-", "-", "->", "-", "-"]
    assert shown == "sft: 1+1 -> 3 (answer 2)"
    assert [report.change(tmp_path, stage) for stage in ("sft", "rl", "later")] == ["sft: eval/accuracy 0% -> 50%", "", ""]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": "sft", "step": 1, "time": 1, "loss": 1.0}) + "\n")
    assert report.summary(tmp_path) == ""


def test_rewards_are_told_as_they_are_where_there_is_no_accuracy(tmp_path):
    rows = [
        ("rl", step, {"eval/reward": r, "eval/reward/+2": r, "eval/reward_greedy": 2 * r}) for step, r in ((0, -1.5), (9, 2.25))
    ]
    write_run(tmp_path, rows)
    page = Outline(report.write(tmp_path).read_text())
    assert [row[3:] for row in page.rows if row[0] == "rl" and len(row) == 9] == [
        ["-1.5", "2.25", "+3.75", "-3", "4.5", "+7.5"]
    ]
    assert ["+2", "-1.5", "2.25"] in page.rows and ["", "", "", "reward, sampled", "reward, greedy"] in page.rows
    first, _, overall, *_ = report.summary(tmp_path).splitlines()
    assert first.startswith("held-out reward, sampled")
    assert report.change(tmp_path, "rl") == "rl: eval/reward -1.5 -> 2.25"
    assert overall.split() == ["all", "|", "-1.5", "-3", "->", "2.2", "4.5"]


def test_a_chart_runs_from_its_first_value_to_its_last(tmp_path):
    line = [(0, 4.0), (50, math.nan), (75, 1.0), (100, 2.0)]
    write_run(tmp_path, [("sft", step, {"loss": value}) for step, value in line])
    page = report.write(tmp_path).read_text()
    (figure,) = re.findall(r"<figure>.*?</figure>", page)
    # x: 52 to 338 for steps 0 to 100; y: 202 to 12 for 1 to 4. The path is broken at step 50.
    assert re.search(r'<path d="([^"]*)"', figure)[1] == "M58.0 12.0M268.0 202.0L338.0 138.7"
    assert '<circle cx="338.0" cy="138.7" r="3"' in figure and ">2</text></svg>" in figure


def test_long_lines_keep_their_spikes_and_ends():
    line = [(step, 1.0) for step in range(10_000)]
    line[4_321], line[7_000] = (4_321, 99.0), (7_000, -99.0)
    thin = chart._thin(line)
    assert len(thin) <= chart._POINTS + 2 and thin[0] == line[0] and thin[-1] == line[-1]
    assert line[4_321] in thin and line[7_000] in thin


@pytest.mark.parametrize(
    ("values", "expected"), [((0.0, 1.0), [0, 0.2, 0.4, 0.6, 0.8, 1]), ((3.0, 1500.0), [0, 500, 1000, 1500]), ((-0.1, 0.1), 5)]
)
def test_ticks_are_round_and_enclose_the_values(values, expected):
    ticks = chart._ticks(*values)
    assert ticks[0] <= values[0] and ticks[-1] >= values[1]
    if isinstance(expected, list):
        assert ticks == pytest.approx(expected)
    else:
        assert len(ticks) == expected


def test_whatever_the_run_says_is_escaped(tmp_path):
    evil = "</td></pre><script>alert('x')</script>&"
    writer = writers.MetricWriter(tmp_path, {}, [evil])
    writer.write("s<script>", 1, {f"eval/accuracy/{evil.replace('/', '')}": 0.5, evil: 1.0, "eval/accuracy": 0.5})
    writer.samples("s<script>", 1, [{"prompt": evil, "completion": evil, evil: [evil]}])
    writer.close()
    (tmp_path / "config.json").write_text(json.dumps({evil: evil}))
    (tmp_path / "environment.json").write_text(json.dumps({evil: evil, "devices": evil}))
    page = report.write(tmp_path).read_text()
    assert "<script" not in page and "</td></pre>" not in page
    assert page.count("&lt;script&gt;alert(") >= 10


def test_half_a_character_in_a_record_ends_no_run(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "answer": "\ud800"}]
    assert b"PAR1" in table.parquet(rows) and b"PAR1" in table.parquet([{"answer": 2**70}, {"answer": 1.5}])
    writer = writers.MetricWriter(tmp_path, {}, ["s"])
    writer.samples("s", 1, rows)
    writer.close()
    (tmp_path / "config.json").write_text("{}")
    assert "<td" in report.write(tmp_path).read_text()


def test_a_report_needs_none_of_the_files_and_says_what_is_broken(tmp_path):
    assert "No metrics have been written yet." in report.write(tmp_path, tmp_path / "new" / "page.html").read_text()
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "time": 2.0, "loss": null}\n{"sta')
    assert "never finite" in report.write(tmp_path).read_text()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        report.write(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        report.write(tmp_path / "nowhere")


def test_environment_names_the_stack(tmp_path):
    import jax

    found = report.environment()
    assert found["jax"] == jax.__version__ and found["python"] == sys.version.split()[0]
    assert found["devices"].startswith(f"{jax.device_count()} x ")
    assert json.loads(json.dumps(found)) == found


def test_runs_are_compared_by_what_differs_with_seeds_together(tmp_path):
    for number, (lr, seed, accuracy) in enumerate([(0.1, 0, 0.5), (0.1, 1, 0.7), (0.2, 0, 0.9)]):
        run = tmp_path / str(number)
        write_run(run, [("sft", 0, {"eval/accuracy": 0.0}), ("sft", 4, {"eval/accuracy": accuracy, "loss": 1.0})])
        (run / "config.json").write_text(json.dumps({"optimizer": {"lr": lr}, "seed": seed, "steps": 4}))
    path, text = report.comparison([tmp_path / str(i) for i in range(3)], tmp_path / "all.html")
    head, first, second = text.splitlines()
    assert head.split() == ["runs", "optimizer.lr", "seeds", "eval/accuracy"]
    assert first.split()[2:] == ["0.1", "2", "0.60", "±", "0.14"] and second.split()[1:] == ["0.2", "1", "0.9"]
    page = path.read_text()
    assert page.count("<figure>") == 2 and page.count("<path") == 6 and "<script" not in page
    result = "eval/accuracy is best with optimizer.lr=0.2: 0.9, against 0.60 ± 0.14 with optimizer.lr=0.1."
    assert page.index(result) < page.index("<table") and ">optimizer.lr=0.1</span>" in page
    # Seeds share the colour of their settings, in the table, the key and both charts.
    assert [page.count(f'stroke="{colour}"') for colour in COLOURS[:3]] == [4, 2, 0]
    assert page.count(f'class="mark" style="background: {COLOURS[0]}"') == 2
    with pytest.raises(UserError, match="none: no run is there"):
        report.comparison([tmp_path / "none", tmp_path / "0"])


@pytest.mark.parametrize(
    ("values", "result"),
    [
        ([(0.1, 0, 0.5), (0.1, 1, 0.7)], "eval/accuracy is 0.60 ± 0.14 over 2 seeds."),
        ([(0.1, 0, 0.5), (0.2, 0, 0.7)], "against 0.5 with lr=0.1; these have one seed each, so it may be chance."),
        (
            [(0.1, 0, 0.5), (0.1, 1, 0.7), (0.2, 0, 0.55), (0.2, 1, 0.67)],
            "lr=0.2: 0.610 ± 0.085, against 0.60 ± 0.14 with lr=0.1; the difference is within the spread over seeds.",
        ),
    ],
)
def test_a_comparison_says_what_seeds_can_tell(values, result):
    row = {"stage": "sft", "step": 4, "eval/accuracy_greedy": 0.0}
    runs = {
        str(i): ({"lr": lr, "seed": seed}, [{**row, "eval/accuracy": x, "eval/reward": x}])
        for i, (lr, seed, x) in enumerate(values)
    }
    assert compare.result(runs).endswith(result) and "eval/reward" not in compare.table(runs)[0]
    (drawn,) = compare.curves(runs, compare.colours(runs, COLOURS))
    assert re.findall("<figcaption>(.*?)</", drawn) == ["sft: eval/accuracy"]  # the greedy one is zero, the reward the same


def test_ticks_that_are_close_are_told_apart():
    drawn = chart.draw({"a": [(0, 1.0), (1, 1.0000004), (2, 2.384e-06 + 1)]}, {"a": "red"})
    names = re.findall('text-anchor="end">(.*?)</text>', drawn)
    assert names[0] == "1" and len(set(names)) == len(names) and names[1] == "+5e-07"
    assert chart.label(2.384e-06) == "2.4e-06"  # which has room in the margin


def test_the_report_opens_with_its_result_and_hides_what_was_always_zero(tmp_path):
    figures = [
        {"eval/accuracy": 0.1},
        {"eval/accuracy": 0.6, "eval/accuracy_low": 0.5, "eval/accuracy_high": 0.7, "skipped": 0.0},
    ]
    write_run(tmp_path, [("sft", 0, figures[0]), ("sft", 100, figures[1]), ("rl", 0, figures[1]), ("rl", 5, figures[1])])
    page = report.write(tmp_path).read_text()
    sentence = "accuracy, sampled, is 60.0% (95% interval 50.0% to 70.0%) after rl step 5, from 10.0% at sft step 0."
    assert page.index(sentence) < page.index("<table")
    # One chart of the accuracy a stage, each with its own axis of steps.
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == ["eval/accuracy"] * 2
    assert ">100</text>" in page.partition("</figure>")[0] and ">100</text>" not in page.partition("</figure>")[2]


def test_answers_before_and_after_a_stage_stand_side_by_side(tmp_path):
    writer = writers.MetricWriter(tmp_path, {}, STAGES)
    for step, answers in ((0, ("7", "8")), (3, ("7", "9")), (9, ("2", "3"))):
        rows = [
            {"prompt": p, "completion": a, "answer": "x", "reward": 0.5} for p, a in zip(("1+1", "1+2"), answers, strict=True)
        ]
        writer.samples("rl", step, [{**row, "kind": "sampled"} for row in rows] + [{"prompt": "5+5", "completion": str(step)}])
    writer.close()
    rows = Outline(report.write(tmp_path).read_text()).rows
    assert ["rl", "sampled", "1+1", "x", "7", "0.5", "2", "0.5"] in rows
    assert ["rl", "sampled", "1+2", "x", "8", "0.5", "3", "0.5"] in rows
    assert [row[3] for row in rows if row[2:3] == ["5+5"]] == ["0", "3", "9"]


def test_a_band_lies_behind_its_line_and_widens_the_axis():
    lines, bands = {"a": [(0, 1.0), (10, 2.0)]}, {"a": [(0, 0.5, 1.5), (10, 1.0, 70.0)]}
    plain, banded = (chart.draw(lines, {"a": "#123456"}, band) for band in (None, bands))
    assert "<polygon" not in plain and ">70</text>" not in plain
    assert banded.index("<polygon") < banded.index("<path") and ">80</text>" in banded
    (corners,) = re.findall(r'points="([^"]*)"', banded)
    xs, ys = zip(*(map(float, corner.split(",")) for corner in corners.split()), strict=True)
    assert len(xs) == 4 and xs[0] == xs[3] and xs[1] == xs[2] and ys[0] < ys[3] and ys[1] < ys[2]  # highs, then lows back
