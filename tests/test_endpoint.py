"""Completions of a server that fails, stalls and lies: what is no answer is asked again, an answer is paid for once."""

import json
import os
import signal
import time

import numpy as np
import pytest
import runs
from completion_server import FAULTS, serving

import jaxpost
from jaxpost import recipe
from jaxpost.errors import UserError
from jaxpost.synthesis import endpoint
from jaxpost.synthesis.endpoint import Answer, Request

pytest.importorskip("openai")
QUICK = {"seconds": 0.4, "patience": 0.02, "retries": 3}


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)


def echo(body) -> str:
    return f"{body['messages'][-1]['content']} again"


def asked(server, folder, texts, skip=False, shared=None, **options) -> list[Answer]:
    """The answers to one request a text."""
    at = endpoint.of(url=server.url, model="m", **{**QUICK, **options})
    groups = ([Request([{"role": "user", "content": text}], 5, f"row {text}")] for text in texts)
    return [one for (one,) in endpoint.answers(at, groups, shared or {}, folder, skip)]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_answer_is_asked_again(tmp_path, fault):
    with serving(echo, lambda body, attempt: fault if body["messages"][0]["content"] == "b" and not attempt else "") as server:
        answers = asked(server, tmp_path, "abc")
        assert [one.text for one in answers] == ["a again", "b again", "c again"] and not any(one.fault for one in answers)
        assert sorted(server.attempts.values()) == [1, 1, 2] and answers[0].tokens == len("a again")
    again = endpoint.of(url=server.url, model="m", **QUICK)  # the server is gone, and what is on disk is not asked for
    group = [Request([{"role": "user", "content": "b"}], 5, "row b")]
    assert list(endpoint.answers(again, [group], {}, tmp_path)) == [[answers[1]]]


def test_an_answer_that_was_cut_off_or_has_no_text_is_of_no_use(tmp_path):
    kinds = {"a": "length", "b": "none"}
    with serving(echo, lambda body, attempt: kinds.get(body["messages"][0]["content"], "")) as server:
        assert [one.fault for one in asked(server, tmp_path, "abc")] == ["cut off", "no text", ""]
        assert set(server.attempts.values()) == {1}


@pytest.mark.parametrize("fault", FAULTS)
def test_attempts_are_bounded_and_the_error_names_the_row(tmp_path, fault):
    with serving(echo, lambda body, attempt: fault if body["messages"][0]["content"] == "c" else "") as server:
        with pytest.raises(
            UserError, match=r"row c: http://127.* gave no answer in 2 attempts, at the last because: ."
        ) as error:
            asked(server, tmp_path, "abc", retries=1, concurrency=1, seconds=0.2)
        assert server.attempts.most_common(1)[0][1] == 2 and "same command" in str(error.value)
        server.fault = lambda body, attempt: ""
        before = server.attempts.total()
        assert len(asked(server, tmp_path, "abc")) == 3 and server.attempts.total() == before + 1, "a and b are on disk"


def test_a_refusal_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    refused = {"b": "400"}
    with serving(echo, lambda body, attempt: refused.get(body["messages"][0]["content"], "")) as server:
        with pytest.raises(UserError, match="row b: .* refuses: status 400, .*bad_rows='skip'"):
            asked(server, tmp_path / "x", "ab")
        answers = asked(server, tmp_path / "y", "abc", skip=True)
        assert [one.fault for one in answers] == ["", "refused by the endpoint", ""]
        refused["b"] = "401"
        with pytest.raises(UserError, match="refuses: status 401.*environment variable OPENAI_API_KEY"):
            asked(server, tmp_path / "z", "ab", skip=True)
        assert server.keys == {"Bearer sk-secret"} and max(server.attempts.values()) == 3, "once in each folder"
    assert not [path for path in tmp_path.rglob("*.json") if b"sk-secret" in path.read_bytes()]
    assert endpoint._hidden("the key sk-secret is wrong", "sk-secret") == "the key [key] is wrong"


def test_requests_are_under_way_together_and_answers_in_order(tmp_path):
    def late(body):
        time.sleep(0.05 if body["messages"][0]["content"] in "05" else 0.01)
        return echo(body)

    with serving(late) as server:
        texts = [str(i) for i in range(40)]
        answers = asked(server, tmp_path, texts, concurrency=4, seconds=5.0)
        assert [one.text for one in answers] == [f"{text} again" for text in texts]
        assert 2 <= server.most <= 4


def test_a_request_has_what_the_settings_say_and_options_take_their_places(tmp_path):
    bodies = []
    with serving(lambda body: bodies.append(body) or "x") as server:
        asked(server, tmp_path, "a", shared={"max_tokens": 7, "stop": None}, options={"seed": None, "top_k": 3})
    assert bodies == [{"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 7, "top_k": 3}]


def test_a_damaged_answer_on_disk_is_asked_for_again(tmp_path):
    with serving(echo) as server:
        asked(server, tmp_path, "ab")
        files = sorted(tmp_path.rglob("*.json"))
        files[0].write_text(files[0].read_text().replace("again", "agaim"))
        files[1].write_text(files[1].read_text()[:-4])
        assert [one.text for one in asked(server, tmp_path, "ab")] == ["a again", "b again"]
        assert set(server.attempts.values()) == {2}


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    with serving(lambda body: "a\ud800") as server:
        assert [one.text for one in asked(server, tmp_path, "a")] == ["a?"]


def test_pauses_double_up_to_the_patience_and_are_as_long_as_the_server_asks(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.5)
    at = endpoint.of(url="http://x/v1", model="m", patience=20)
    for attempt in range(12):
        pauses = [endpoint._pause(at, attempt, 0.0) for _ in range(50)]
        assert 0.25 * 2**attempt <= max(pauses) <= 0.5 * 2**attempt or max(pauses) == 20
        assert len(set(pauses)) > 1 or min(pauses) == 20
    assert endpoint._pause(at, 0, 7.0) == 7 and endpoint._pause(at, 0, 70.0) == 20


def test_how_long_a_server_asks_to_wait():
    assert endpoint._after("1.5") == 1.5 and endpoint._after("") == endpoint._after("soon") == endpoint._after("-3") == 0
    assert endpoint._after("Fri, 31 Dec 2100 23:59:59 GMT") > 1e6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"url": "127.0.0.1:8000"}, "config.endpoint.url: .* is no address"),
        ({"key": "sk-abc"}, "the name of the environment variable"),
        ({"concurrency": 0}, "config.endpoint.concurrency: 0"),
        ({"seconds": 0}, "config.endpoint.seconds: 0"),
        ({"retries": 1.5}, "config.endpoint.retries: 1.5"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        endpoint.of(**{"url": "http://x/v1", "model": "m", **changes})
    assert "sk-abc" not in str(error.value)


# ---- a stage

PARSER = """
def parse(completion, record):
    return {"n": record["n"], "text": completion}
"""


def settings(folder, server, count=40, **changes) -> dict:
    (folder / "mine.py").write_text(PARSER)
    (folder / "records.jsonl").write_text("".join(json.dumps({"n": i}) + "\n" for i in range(count)))
    stage = {"do": "generate", "prompt": {"name": "fill", "template": "{{ n }}"}, "parser": f"{folder}/mine.py:parse"}
    stage |= {"data": str(folder / "records.jsonl"), "endpoint": {"url": server.url, "model": "m", **QUICK, "seconds": 5.0}}
    return {"stages": ("drawn",), "drawn": {**stage, "rollouts": {"group": 1}, **changes}}


def rows(workdir) -> list[dict]:
    parts = sorted((workdir / "rows").glob("*/part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def test_a_stage_asks_an_endpoint_without_a_model_and_keeps_what_is_there(tmp_path, capsys):
    with serving(echo, lambda body, attempt: "500" if body["messages"][0]["content"] == "17" else "") as server:
        config = recipe.make(**settings(tmp_path, server))
        with pytest.raises(UserError, match="records.jsonl, line 18: http://127.* gave no answer in 4 attempts"):
            jaxpost.train(config, tmp_path / "w")
        assert [row["n"] for row in rows(tmp_path / "w")] == list(range(17)), "what came before is written"
        server.fault = lambda body, attempt: "length" if body["messages"][0]["content"] == "38" else ""
        jaxpost.train(config, tmp_path / "w")
        assert rows(tmp_path / "w") == [{"n": i, "text": f"{i} again"} for i in range(40) if i != 38]
        assert "39 rows kept of 40 completions of 40 prompts" in (printed := capsys.readouterr().err)
        assert "1 dropped: cut off (first records.jsonl, line 39" in printed
        (meta,) = (tmp_path / "w" / "rows").glob("*/meta.json")
        assert json.loads(meta.read_text())["facts"] == {"rows": 39, "dropped": {"cut off": [1, "records.jsonl, line 39", ""]}}
        before = server.attempts.total()
        jaxpost.train(config, tmp_path / "w")
        assert server.attempts.total() == before, "nothing is made twice"


def test_another_parser_and_a_larger_budget_ask_only_what_is_new(tmp_path):
    with serving(echo) as server:
        jaxpost.train(recipe.make(**settings(tmp_path, server, budget={"completions": 30})), tmp_path / "w")
        before = server.attempts.total()
        jaxpost.train(recipe.make(**settings(tmp_path, server, parser="text")), tmp_path / "w")
        assert (before, server.attempts.total()) == (30, 40)


def test_another_port_goes_on_with_what_is_there(tmp_path):
    with serving(echo) as server:
        jaxpost.train(recipe.make(**settings(tmp_path, server)), tmp_path / "w")
    with serving(lambda body: 1 / 0) as server:
        jaxpost.train(recipe.make(**settings(tmp_path, server)), tmp_path / "w")
    assert len(rows(tmp_path / "w")) == 40


def test_completions_of_one_prompt_have_seeds_of_their_own(tmp_path):
    bodies = []
    with serving(lambda body: bodies.append(body) or f"{body['seed']}") as server:
        jaxpost.train(recipe.make(**settings(tmp_path, server, count=3, rollouts={"group": 2, "new": 9})), tmp_path / "w")
    assert len({(row["n"], row["text"]) for row in rows(tmp_path / "w")}) == 6
    assert {(body["max_tokens"], body["temperature"]) for body in bodies} == {(9, 1.0)}


def test_equal_records_and_further_rounds_are_asked_with_other_seeds(tmp_path):
    with serving(lambda body: f"{body['seed']}") as server:
        chosen = settings(tmp_path, server, count=2, budget={"completions": 6})
        (tmp_path / "records.jsonl").write_text('{"n": 1}\n{"n": 1}\n')
        jaxpost.train(recipe.make(**chosen), tmp_path / "w")
    assert len({row["text"] for row in rows(tmp_path / "w")}) == 6 == server.served


RECIPE = """
from jaxpost import recipe
from jaxpost.synthesis import endpoint, ledger

ledger.SECONDS = 0.2  # a part every so often
endpoint.FIRST_PAUSE = 0.01


def get_config(arg=""):
    return recipe.make(**{settings!r})
"""


@pytest.mark.slow
def test_a_thousand_rows_whose_process_is_killed_three_times_are_there_once_each(tmp_path):
    """By a server that fails, stalls and lies all the while; the third time without the answers on disk."""

    def fault(body, attempt):
        n = int(body["messages"][0]["content"])
        return FAULTS[n // 7 % len(FAULTS)] if n % 7 == 0 and attempt == 0 else ""

    with serving(lambda body: time.sleep(0.002) or echo(body), fault) as server:
        chosen = settings(tmp_path, server, count=1000)
        chosen["drawn"]["endpoint"] |= {"seconds": 1.0, "concurrency": 16}
        (tmp_path / "recipe.py").write_text(RECIPE.format(settings=chosen))
        for kill_at in (150, 450, 750, None):
            child = runs.start(runs.command(tmp_path / "recipe.py", tmp_path / "w"))
            while kill_at and server.served < kill_at and child.poll() is None:
                time.sleep(0.005)
            if kill_at:
                assert child.poll() is None, child.stderr.read()
                os.kill(child.pid, signal.SIGKILL)
            _, printed = child.communicate(timeout=120)
            assert child.returncode == (-signal.SIGKILL if kill_at else 0), printed
            if kill_at == 450:
                for file in (tmp_path / "w" / "answers").rglob("*.json"):
                    file.unlink()
    assert rows(tmp_path / "w") == [{"n": i, "text": f"{i} again"} for i in range(1000)]
    assert "1,000 rows kept of 1,000 completions" in printed and np.all(np.array(list(server.attempts.values())) < 8)
