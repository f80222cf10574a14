"""The table of completions: aligned whatever a model wrote, the same columns everywhere, kept to the letter in Parquet."""

import math
import re
import sys

import numpy as np
import pytest

from jaxpost.errors import UserError
from jaxpost.reporting import report, table, writers

ROWS = [
    {"prompt": "1+1", "completion": "2", "advantage": 0.5, "rewards/right": 1.0, "reward": 1.25, "rewards/short": 0.25},
    {"prompt": "1+1", "completion": "it is 3", "advantage": -0.5, "rewards/right": 0.0, "reward": 0.0, "rewards/short": None},
    {"prompt": "7x8", "completion": "56", "advantage": 0.0, "rewards/right": 1.0, "reward": 1.0, "rewards/short": math.nan},
]


def test_columns_have_one_order():
    rows = [{"kind": "greedy", "advantage": 1, **ROWS[0]}, {"step": 3, "answer": "2", "stage": "rl"}]
    order = "stage step prompt completion answer reward rewards/right rewards/short advantage kind"
    assert table.columns(rows) == order.split()


def test_a_table_is_aligned_and_says_a_prompt_once():
    assert table.shown(ROWS, 80) == "\n".join(
        [
            "prompt  completion  reward  right  short  advantage",
            "1+1     2             1.25      1   0.25        0.5",
            "        it is 3          0      0      -       -0.5",
            "7x8     56               1      1      -          0",
        ]
    )
    assert table.shown([], 80) == ""
    again = [{"prompt": "1+1", "step": 1234567, "ended": True}] * 3
    assert table.shown(again, 80).split("\n")[1:] == [
        "1234567  1+1      True",
        "1234567           True",
        "1234567           True",
    ]


def test_long_texts_share_the_width_and_are_folded_at_spaces():
    rows = [{"prompt": "one two three four five six seven eight", "completion": "a\nb " + "x" * 100, "reward": 0.123456}]
    drawn = table.shown(rows, 40, lines=3).split("\n")
    # 40 less a number of 6 and two gaps of 2 leaves 15 for each text.
    assert drawn == [
        "prompt           completion       reward",
        "one two three    a⏎ b              0.123",
        "four five six    xxxxxxxxxxxxxxx",
        "seven eight      xxxxxxxxxxxxxx…",
    ]
    assert table.shown([{"prompt": "one two four five"}], 12).split("\n")[1:] == ["one two four", "five"]
    short = table.shown([{"prompt": "12+34", "completion": "x" * 100, "reward": 1}], 40, lines=1).split("\n")
    assert short[1] == "12+34   " + "x" * 23 + "…" + "       1"  # what one text does not need the other has


def test_what_a_model_writes_reaches_no_terminal_and_moves_no_column():
    rows = [{"completion": "\033[2J\rgone\x07\u202e", "reward": 1}, {"completion": "日本 e\u0301", "reward": 2}]
    drawn = table.shown(rows, 80)
    assert drawn.split("\n")[1] == "·[2J·gone··       1"
    assert drawn.split("\n")[2] == "日本 e\u0301" + " " * 5 + " " * 7 + "2"
    assert all(letter.isprintable() for letter in drawn.replace("\n", ""))


def test_colour_tells_better_from_worse_and_changes_nothing_else():
    drawn = table.shown(ROWS, 80, colour=True).split("\n")
    assert [line[:5] for line in drawn] == ["\033[2mp", "\033[32m", "\033[31m", "7x8  "]
    assert re.sub("\033\\[[0-9]*m", "", "\n".join(drawn)) == table.shown(ROWS, 80)
    assert all(line.endswith("\033[0m") for line in drawn[:3])


def test_parquet_keeps_every_value_and_says_what_is_missing(tmp_path):
    from pyarrow import parquet

    rows = [*ROWS, {"prompt": "é\n\033", "step": np.int64(3), "stopped": np.bool_(True), "odd": [1, "a"], "half": 1}]
    rows += [{"half": 0.5, "odd": "b", "never": None}]
    writers.write_parquet(tmp_path / "rows.parquet", rows)
    found = parquet.read_table(tmp_path / "rows.parquet")
    assert found.column_names == table.columns(rows)
    kinds = {name: str(found.schema.field(name).type) for name in found.column_names}
    texts, numbers = ("prompt", "completion", "odd"), ("reward", "rewards/right", "rewards/short", "advantage", "half", "never")
    assert kinds == dict.fromkeys(texts, "string") | dict.fromkeys(numbers, "double") | {"step": "int64", "stopped": "bool"}
    back = found.to_pylist()
    assert [row["rewards/short"] for row in back] == [0.25, None, None, None, None]
    assert [row["prompt"] for row in back] == ["1+1", "1+1", "7x8", "é\n\033", None]
    assert back[3]["step"] == 3 and back[3]["stopped"] is True and back[3]["odd"] == '[1, "a"]'
    assert (back[4]["half"], back[4]["odd"], back[3]["half"]) == (0.5, '"b"', 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_without_pyarrow_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        table.parquet(ROWS)


def kept(workdir):
    return sorted(str(path.relative_to(workdir / "completions")) for path in workdir.glob("completions/*/*"))


@pytest.mark.parametrize("remote", [False, True])
def test_a_run_keeps_completions_and_takes_them_back_with_its_steps(tmp_path, monkeypatch, remote):
    from pyarrow import parquet

    monkeypatch.setattr(writers.cloud, "is_remote", lambda path: remote)
    writer = writers.MetricWriter(tmp_path, {}, ["sft", "rl"])
    for stage, step in (("sft", 5), ("rl", 0), ("rl", 20), ("rl", 100)):
        writer.completions(stage, step, ROWS)
    writer.close()
    assert kept(tmp_path) == ["rl/00000000.parquet", "rl/00000020.parquet", "rl/00000100.parquet", "sft/00000005.parquet"]
    first = parquet.read_table(tmp_path / "completions" / "rl" / "00000020.parquet").to_pylist()[0]
    assert (first["stage"], first["step"], first["completion"], first["reward"]) == ("rl", 20, "2", 1.25)
    writers.cut_back(tmp_path, ["sft", "rl"], "rl", 20)
    assert kept(tmp_path) == ["rl/00000000.parquet", "rl/00000020.parquet", "sft/00000005.parquet"]
    writers.cut_back(tmp_path, ["sft", "rl"], "sft", 4)
    assert kept(tmp_path) == []


def test_the_report_has_every_reward_and_marks_the_advantage(tmp_path):
    writer = writers.MetricWriter(tmp_path, {}, ["rl"])
    writer.samples("rl", 1, ROWS)
    writer.close()
    page = report.write(tmp_path).read_text()
    section = page[page.index("<h2>Samples</h2>") :]
    heads = re.findall(r'<th class="text">(.*?)</th>', section)
    assert heads == ["stage", "step", "prompt", "completion", "reward", "rewards/right", "rewards/short", "advantage"]
    cells = [re.findall(r"<td(.*?)>(.*?)</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", section)]
    assert [[value for _, value in row[4:]] for row in cells] == [
        ["1.25", "1", "0.25", "0.5"],
        ["0", "0", "", "-0.5"],
        ["1", "1", "", "0"],
    ]
    assert [row[7][0] for row in cells] == [' class="better"', ' class="worse"', ""] and cells[0][4][0] == ""
