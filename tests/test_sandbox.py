"""The process beside: what hangs, dies or asks for too much in it; and Reasoning Gym, whose data sets live there."""

import importlib.util
import inspect
import json
import os
import signal
import sys
import tempfile
import threading

import pytest

from jaxpost.errors import UserError
from jaxpost.rewards import gym, sandbox


def test_a_package_that_is_missing_is_named_before_anything_runs():
    with pytest.raises(UserError, match=r"package not_there .* pip install 'jaxpost\[rewards\]'"):
        sandbox.call("operator:add", args=[1, 2], seconds=1.0, package="not_there")
    with pytest.raises(UserError, match="package not_there"):
        sandbox.warm(module="operator", package="not_there")


@pytest.fixture
def alone():
    """No child that another test left."""
    sandbox.close()
    yield
    sandbox.close()


def test_a_child_is_kept_until_it_fails(alone):
    assert sandbox.call("operator:add", args=[1, 2], seconds=5.0) == 3
    (child,) = sandbox._idle
    assert sandbox.call("operator:mul", args=["é\ud800\n", 70_000], seconds=5.0) == "é\ud800\n" * 70_000
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        sandbox.call("operator:truediv", args=[1, 0], seconds=5.0)
    with pytest.raises(RuntimeError, match="TypeError.*JSON"):
        sandbox.call("builtins:object", args=[], seconds=5.0)
    assert sandbox._idle == [child] and sandbox.call("builtins:print", args=["{}"], seconds=5.0) is None
    sandbox.close()
    assert child.process.poll() is not None and not sandbox._idle


# Asleep, and in a product in C that hears nothing: the clock ends both.
@pytest.mark.parametrize(("function", "args"), [("time:sleep", [60]), ("builtins:pow", [3, 10**9])])
def test_a_function_that_hangs_dies_with_its_process(alone, function, args):
    sandbox.warm(module="operator")
    (child,) = sandbox._idle
    with pytest.raises(TimeoutError, match="more than 0.2 s"):
        sandbox.call(function, args=args, seconds=0.2)
    assert child.process.poll() is not None and not sandbox._idle
    assert sandbox.call("operator:add", args=[1, 2], seconds=5.0) == 3


def test_a_child_whose_parent_is_gone_ends_by_itself(alone):
    child = sandbox._Child()
    child.load("time")
    child.process.stdin.write(b'["time:sleep", [60], 0.1]\n')
    assert child.process.wait(timeout=30) == -14  # its own alarm
    child.kill()


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        ("os:abort", [], "ended its process"),
        ("sys:exit", [3], "SystemExit"),
        ("builtins:bytearray", [5 * 2**30], "MemoryError"),
        ("os:system", ["true"], "PermissionError"),
        ("subprocess:run", [["true"]], "PermissionError"),
        ("builtins:open", ["written", "w"], "PermissionError"),
        ("os:remove", ["written"], "PermissionError"),
        ("socket:create_connection", [["127.0.0.1", 9]], "PermissionError"),
        ("no_such_module:f", [], "ModuleNotFoundError"),
        ("operator:no_such", [], "AttributeError"),
    ],
)
def test_a_child_dies_or_refuses_and_says_so(function, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=message):
        sandbox.call(function, args=args, seconds=5.0)
    assert not list(tmp_path.iterdir()) and sandbox.call("operator:add", args=[1, 2], seconds=5.0) == 3


def test_a_child_leaves_no_files_and_finds_what_its_parent_finds(alone, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "only_here.py").write_text("def f():\n    return 7\n")
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setattr(sys, "path", ["", *(entry for entry in sys.path if entry)])
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert sandbox.call("only_here:f", args=[], seconds=5.0) == 7
    assert sandbox.call("tempfile:gettempdir", args=[], seconds=5.0) == str(tmp_path)
    for refused, args in (("tempfile:mkstemp", []), ("os:open", ["written", os.O_CREAT | os.O_WRONLY])):
        with pytest.raises(RuntimeError, match="PermissionError"):
            sandbox.call(refused, args=args, seconds=5.0)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "only_here.py"]


def test_a_child_that_does_not_read_keeps_nobody_waiting(alone):
    sandbox.warm(module="operator")
    (child,) = sandbox._idle
    os.kill(child.process.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError, match="more than 0.2 s"):
        sandbox.call("operator:add", args=["a" * 2**20, "b"], seconds=0.2)  # more than a pipe holds
    assert child.process.poll() is not None


def test_threads_have_a_child_each(alone):
    waiting = threading.Thread(target=sandbox.call, args=("time:sleep",), kwargs={"args": [1.0], "seconds": 30.0})
    waiting.start()
    while not sandbox._idle and waiting.is_alive():  # the other call ends while the first still sleeps
        assert sandbox.call("operator:add", args=[1, 2], seconds=30.0) == 3
    assert waiting.is_alive() and len(sandbox._idle) == 1
    waiting.join()
    assert len(sandbox._idle) == 2


class Fake:
    """A data set of Reasoning Gym's shape: sums of the place's digits, right up to white space, some of which hang."""

    def __init__(self, most=9, seed=None, size=500):
        if most < 1:
            raise ValueError("most must be positive")
        self.most = most

    def __getitem__(self, place):
        a, b = place % self.most, place // self.most % self.most
        order = "".join({"v", "w", "x", "y", "z"})  # one of 120, another in each process that does not see to it
        return {"question": f"{a}+{b}?{order}", "answer": str(a + b), "metadata": {(a, b): {a}}}  # no JSON

    def score_answer(self, answer, entry):
        while answer == "hang":
            pass
        return 1.0 if answer == entry["answer"] else 0.01


LISTED = """

class Listed(Fake):
    def __getitem__(self, place):
        if place >= 40:
            raise IndexError(place)
        return super().__getitem__(place)

    def __len__(self):
        return 40

"""


@pytest.fixture
def fake_gym(alone, tmp_path, monkeypatch):
    """A package reasoning_gym of the two data sets fake_sums and fake_list, for this process and its children."""
    source = inspect.getsource(Fake) + LISTED
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "factory.py").write_text(
        source + "DATASETS = {'fake_sums': (Fake, None), 'fake_list': (Listed, None)}\n"
    )
    (tmp_path / "reasoning_gym" / "__init__.py").write_text(
        "from reasoning_gym.factory import DATASETS\n\ndef create_dataset(name, **kw):\n    return DATASETS[name][0](**kw)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sandbox._need.cache_clear()
    yield
    sandbox._need.cache_clear()


def test_a_gym_task_has_what_a_task_has(fake_gym):
    task = gym.task("fake_sums", most=50)
    records = [task.record(i) for i in range(200)]
    sandbox.close()  # another process makes the same
    assert records == [task.record(i) for i in range(200)] != [task.record(i, seed=1) for i in range(200)]
    tests = task.test_records(30)
    assert len({r["prompt"] for r in tests}) == len(tests) == 30 and task.test_records(10) == tests[:10]
    assert not {r["prompt"] for r in tests} & {r["prompt"] for r in records}
    one = json.loads(json.dumps(records[0]))  # as it comes back from a file
    assert one["cell"] == "fake_sums" and task.reward(one, f"so <answer> {one['answer']} </answer>.") == 1.0
    assert task.reward(one, one["answer"] + "\n") == 1.0 and task.reward(one, "<answer>x</answer>") == 0.01
    with pytest.raises(TimeoutError):
        gym.score(one, "hang", seconds=0.2)


def test_a_gym_list_is_drawn_from_over_and_over(fake_gym):
    task = gym.task("fake_list")
    train, test = (
        {r["prompt"].partition("?")[0] for r in part} for part in ([task.record(i) for i in range(400)], task.test_records(40))
    )
    assert train | test == {f"{i % 9}+{i // 9}" for i in range(40)} and not train & test and test
    one = task.record(0)
    assert task.reward(one, one["answer"]) == 1.0


def test_a_problem_that_is_another_in_the_child_is_a_failure(fake_gym):
    one = gym.task("fake_sums").record(0)
    with pytest.raises(RuntimeError, match="another problem"):
        gym.score({**one, "prompt": "other"}, "1")


def test_gym_settings_that_mean_nothing_are_refused(fake_gym):
    with pytest.raises(UserError, match="Did you mean 'fake_sums'"):
        gym.task("fake_sum")
    for options in ({"mots": 3}, {"most": 0}):
        with pytest.raises(UserError, match="fake_sums does not take"):
            gym.task("fake_sums", **options)
    with pytest.raises(UserError, match="no problem for the split test"):
        gym.task("fake_sums", most=1).test_records(1)
    with pytest.raises(UserError, match="split='dev'"):
        gym.task("fake_sums").record(0, split="dev")
    with pytest.raises(UserError, match="per_cell=0"):
        gym.task("fake_sums").test_records(0)
    with pytest.raises(UserError, match="not from rewards.gym.task"):
        gym.score({"prompt": "1+1?"}, "2")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
@pytest.mark.parametrize(("name", "wrong"), [("chain_sum", 0.0), ("countdown", 0.01), ("word_ladder", 0.0)])
def test_a_real_gym(name, wrong):
    task = gym.task(name)
    one = task.record(0)
    assert task.reward(one, one["answer"]) == 1.0 and task.reward(one, "<answer>nothing</answer>") == wrong


@pytest.mark.parametrize(("own", "kept"), [("mine", True), ("", False), ("not_there", False)])
def test_a_folder_for_matplotlib_that_the_user_names_is_kept(own, kept, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / own) if own else "")
    environment = os.environ | sandbox._environment()
    assert environment["MPLCONFIGDIR"] == str(tmp_path / "mine" if kept else tempfile.gettempdir())


def test_a_child_has_a_place_for_matplotlibs_cache(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HOME", "/nowhere")
    sandbox.close()  # a new child, which has imported nothing yet
    sandbox.warm(module="matplotlib")
