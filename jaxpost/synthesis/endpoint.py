"""Completions of any OpenAI-compatible server, through the `openai` client: the extra `endpoint`.

    endpoint={"url": "http://127.0.0.1:8000/v1", "model": "NAME", "concurrency": 16}

So many requests are under way at a time; answers are given in the order of the requests. A server may refuse, stall, end in the
middle or answer with something else: each attempt has `seconds` in all, however slowly bytes drip, and what is no answer is
asked again, `retries` times, after pauses that double up to `patience` seconds or last as long as the server asks (Retry-After,
up to `patience`). An answer is kept on disk under a digest of its request, so whoever asks the same again pays nothing.

The API key is that of the environment variable `key`. It is in no file and in no message.
"""

import asyncio
import collections
import datetime
import email.utils
import hashlib
import importlib
import json
import os
import random
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from jaxpost.errors import UserError, first_line
from jaxpost.reporting import writers
from jaxpost.storage.host import read_object

FIRST_PAUSE = 0.5  # seconds before the second attempt
_AGAIN = {408, 409, 425, 429}  # statuses of a server that may answer later; 500 and above besides
_OF_THE_REQUEST = {400, 413, 422}  # statuses that are about one request; others are about all of them


class Answer(NamedTuple):
    """A completion: its text, its tokens (None where the server does not say), and why it is of no use, or ""."""

    text: str
    tokens: int | None
    fault: str = ""


class Request(NamedTuple):
    """Messages, the seed of the server's noise, and the record's place, for errors."""

    messages: Sequence[Mapping]
    seed: int
    place: str


class Endpoint(NamedTuple):
    """A server and how it is asked; `of` has the keywords."""

    url: str
    model: str
    key: str
    concurrency: int
    seconds: float
    retries: int
    patience: float
    options: Mapping[str, Any]


class _Fault(Exception):
    """What is no answer, and maybe one at the next attempt. after: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


class _Refusal(Exception):
    """An answer that the next attempt would not change. general: whether it is about all requests."""

    def __init__(self, reason: str, general: bool):
        super().__init__(reason)
        self.general = general


def of(
    *,
    url: str,
    model: str,
    key: str = "OPENAI_API_KEY",
    concurrency: int = 8,
    seconds: float = 120.0,
    retries: int = 6,
    patience: float = 60.0,
    options: Mapping[str, Any] | None = None,
) -> Endpoint:
    """A server, checked. options: further keys of a request, {"top_k": 20}; None leaves out one that is sent otherwise, as
    {"seed": None}. Raises UserError for keywords that cannot be, and where the client is not installed.
    """
    _library()
    if not isinstance(url, str) or not re.match(r"https?://[^/]", url):
        raise UserError(f"config.endpoint.url: {url!r} is no address; give one as http://127.0.0.1:8000/v1.")
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_]\w*", key):
        raise UserError(
            "config.endpoint.key: give the name of the environment variable that holds the API key, never the key itself."
        )
    for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"config.endpoint.{name}: {value!r}; give a whole number of at least {least}.")
    for name, value in (("seconds", seconds), ("patience", patience)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise UserError(f"config.endpoint.{name}: {value!r}; give seconds above 0.")
    return Endpoint(url, model, key, concurrency, float(seconds), retries, float(patience), dict(options or {}))


def answers(
    endpoint: Endpoint, groups: Iterable[Sequence[Request]], shared: Mapping[str, Any], folder, skip: bool = False
) -> Iterator[list[Answer]]:
    """The answers to each group of requests, in order; up to twice `concurrency` requests are made ahead of those.

    shared: what all requests have, as temperature and max_tokens; folder: of the answers that are kept; skip: whether a request
    that the server refuses for itself gives an Answer with a fault. Raises UserError, with the record's place, for other
    refusals and where the attempts are used up.
    """
    loop, waiting, left = asyncio.new_event_loop(), collections.deque(), iter(groups)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    secret = os.environ.get(endpoint.key, "").strip()
    client = _library().AsyncOpenAI(base_url=endpoint.url, api_key=secret or "none", max_retries=0, timeout=endpoint.seconds)
    gate = asyncio.Semaphore(endpoint.concurrency)

    def submitted(request: Request):
        body = {"model": endpoint.model, "messages": list(request.messages), **shared, "seed": request.seed, **endpoint.options}
        body = {name: value for name, value in body.items() if value is not None}
        digest = hashlib.sha256(json.dumps([endpoint.url, body, request.seed], sort_keys=True).encode()).hexdigest()
        file = epath.Path(folder) / digest[:2] / f"{digest}.json"
        return asyncio.run_coroutine_threadsafe(_asked(endpoint, client, gate, body, file, request.place, skip, secret), loop)

    try:
        while True:
            while sum(map(len, waiting)) < 2 * endpoint.concurrency and (group := next(left, None)) is not None:
                waiting.append([submitted(request) for request in group])
            if not waiting:
                return
            yield [future.result() for future in waiting.popleft()]
    finally:
        asyncio.run_coroutine_threadsafe(_closed(client), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _closed(client) -> None:
    """Cancels the requests under way, and closes the connections."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.close()


async def _asked(endpoint, client, gate, body: dict, file: epath.Path, place: str, skip: bool, secret: str) -> Answer:
    """The answer to one request, from its file if it is there."""
    if (kept := _read(file)) is not None:
        return kept
    async with gate:
        for attempt in range(endpoint.retries + 1):
            try:
                answer = await _attempt(endpoint, client, body)
                break
            except _Refusal as error:
                if skip and not error.general:
                    return Answer("", None, "refused by the endpoint")
                remedy = "" if error.general else ", or leave such records out: config.bad_rows='skip'"
                raise UserError(_hidden(f"{place}: {endpoint.url} refuses: {error}; mend it{remedy}.", secret)) from None
            except _Fault as error:
                if attempt == endpoint.retries:
                    raise UserError(_hidden(_used_up(endpoint, place, error), secret)) from None
                await asyncio.sleep(_pause(endpoint, attempt, error.after))
    _write(file, answer)
    return answer


def _pause(endpoint: Endpoint, attempt: int, after: float) -> float:
    """Seconds before the next attempt: doubled each time, drawn so that requests do not come back together, at least `after`,
    and up to `patience`.
    """
    pause = FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1.0)
    return min(max(pause, after), endpoint.patience)


def _used_up(endpoint: Endpoint, place: str, error: _Fault) -> str:
    asks = f" It asks to wait {error.after:.0f} s." if error.after > endpoint.patience else ""
    return (
        f"{place}: {endpoint.url} gave no answer in {endpoint.retries + 1} attempts, at the last because: {error}.{asks} What "
        "is there is kept, and the same command goes on from there. config.endpoint.retries and .seconds give it more time."
    )


async def _attempt(endpoint: Endpoint, client, body: Mapping) -> Answer:
    """One request and what the server makes of it. Raises _Fault and _Refusal for what is no answer."""
    library = _library()
    named = {"model": body["model"], "messages": body["messages"]}
    rest = {name: value for name, value in body.items() if name not in named}
    try:
        call = client.chat.completions.with_raw_response.create(**named, extra_body=rest)
        response = await asyncio.wait_for(call, endpoint.seconds)
        return _answer(json.loads(response.content))
    except library.APIStatusError as error:
        status, reason = error.status_code, f"status {error.status_code}, {first_line(error)}"
        if status in _AGAIN or status >= 500:
            raise _Fault(reason, _after(error.response.headers.get("retry-after", ""))) from error
        hint = f" (the API key is that of the environment variable {endpoint.key})" if status in (401, 403) else ""
        raise _Refusal(reason + hint, status not in _OF_THE_REQUEST) from error
    except TimeoutError as error:
        raise _Fault(f"no whole answer within {endpoint.seconds:g} s") from error
    except library.OpenAIError as error:  # a connection that fails or ends early, or a time-out of the client's own
        raise _Fault(f"{first_line(error)} {first_line(error.__cause__)}" if error.__cause__ else first_line(error)) from error
    except (ValueError, RecursionError) as error:
        raise _Fault(f"broken JSON ({first_line(error)})") from error


def _answer(content: Any) -> Answer:
    """The answer in a response. Raises _Fault for a response that has none."""
    if isinstance(content, dict) and content.get("error"):
        raise _Fault(f"an error in place of an answer, {str(content['error'])[:200]}")
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _Fault("an answer without choices")
    message, reason = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict) or not isinstance(reason, str):
        raise _Fault("an answer without a message and a finish_reason")
    usage = content.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens = tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0 else None
    if reason in ("length", "content_filter"):
        return Answer("", tokens, "cut off" if reason == "length" else "filtered by the endpoint")
    text = message.get("content")
    if not isinstance(text, str):
        return Answer("", tokens, "no text")
    return Answer(text.encode("utf-8", "replace").decode(), tokens)  # half a surrogate pair is no text


def _after(value: str) -> float:
    """The seconds of a Retry-After header: a number, or a date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        then = email.utils.parsedate_to_datetime(value)
        return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _hidden(message: str, secret: str) -> str:
    """The message without the API key, which a server may repeat."""
    return message.replace(secret, "[key]") if secret else message


def _read(file: epath.Path) -> Answer | None:
    """The answer that a file holds; None where there is none, or none that is whole."""
    if not file.exists():
        return None
    try:
        content = read_object(file)
        answer = Answer(*content["answer"])
    except (UserError, KeyError, TypeError):
        return None
    return answer if content.get("digest") == _digest(answer) else None


def _write(file: epath.Path, answer: Answer) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"answer": list(answer), "digest": _digest(answer)}
    writers.replace(file, json.dumps(content, ensure_ascii=False).encode())


def _digest(answer: Answer) -> str:
    return hashlib.sha256(json.dumps(list(answer)).encode()).hexdigest()


def _library() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise UserError(
            f"config.endpoint needs openai, which is not here ({error}); pip install 'jaxpost[endpoint]'."
        ) from error
