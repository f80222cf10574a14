"""Evaluation: an Eval is a function that yields (name, value).

    python -m jaxpost.evaluate --model=FOLDER --data=FILE.jsonl        perplexity of a file
    python -m jaxpost.evaluate --model=WORKDIR --task=arithmetic       a task's accuracy, by generation
    python -m jaxpost.evaluate --model=FOLDER --lm_eval=task.yaml      lm-eval's tasks (extra [eval])

`held_out` gives the objective's loss and metrics on data it did not train on; `graded` has the model answer a task's test
problems, sampled at temperature 1 and greedily, and lets a reward judge. The mean of a reward that is annotated `-> bool`, as a
verifier is, is called accuracy; that of any other is called reward.

`perplexity` is exp(nll), the mean over all scored tokens of a file. Which tokens are scored the file's shape says, as in
training: of `text` all (but each document's first, which nothing precedes), of a conversation the assistant's, of prompt and
completion the completion's, stop tokens included. Every document is read by itself, so packing several into a row only saves
time. One that is longer than the window is read in windows that overlap by half: each token is scored once, the first window's
all and then those of each window's second half, which have between half a window and a whole one of context. Figures of
different windows therefore differ: a longer window gives more context and a lower perplexity.
"""

import functools
import inspect
import json
import math
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
import tqdm
from absl import flags

from jaxpost import api, cli, metrics, sharding, table
from jaxpost.data import chat, encoding, mixture, source
from jaxpost.data.chat import TRAIN_ON
from jaxpost.errors import UserError
from jaxpost.evals import pass_at_k
from jaxpost.models import loading
from jaxpost.objectives import sft
from jaxpost.resolve import entry_of
from jaxpost.rollouts import scoring
from jaxpost.rollouts.scores import everywhere
from jaxpost.sampling.decode import answers, complete, ready
from jaxpost.stages import tasks
from jaxpost.step import make_evaluation
from jaxpost.tokenizer import check_ids
from jaxpost.types import Params

# What a window is where none is asked for, unless the model takes less.
WINDOW = 1024
NOISE = 271828  # the seed of all evaluations' samples


def held_out(evaluate: Callable, params: Params, batches: Iterable[dict], mesh, batch_size: int) -> Iterator[tuple[str, float]]:
    """(eval/<metric>, value) over all batches: sums and weights add up first, and are divided once.

    evaluate: what `step.make_evaluation` gives, jitted; batches: this process's rows of each.
    """
    seen = []
    for batch in batches:
        seen.append(jax.device_get(evaluate(params, sharding.distribute(batch, mesh, batch_size), jax.random.PRNGKey(0))))
    stacked = jax.tree.map(lambda *x: np.stack(x), *seen)
    for name, value in metrics.values(metrics.merge(stacked)).items():
        yield f"eval/{name}", value


def graded(
    model,
    params: Params,
    tokenizer,
    records: list[dict],
    rewards: Mapping,
    mesh,
    *,
    rows: int,
    options: dict,
    judging: Mapping = types.MappingProxyType({}),
) -> Iterator[tuple[str, float | list]]:
    """(eval/reward, mean of one sample a problem), (eval/reward_greedy, ...), the same for each cell as <name>/<cell>, where
    there are several. Where a reward is a verifier, whose signature says that it gives a bool, these are called accuracy and
    are about it, and eval/reward is there besides; _low and _high after each are its 95% interval (`wilson`). Of several
    rewards each as eval/rewards/<its name>, too. A completion that a reward does not apply to is left out of its mean.

    records: dicts with prompt, and maybe answer, cell (else "all") and a weight in the overall mean. rewards: {name:
    (function, weight)}; judging: what `scoring.judged` takes. rows: how many are completed at a time; options: prompt_window,
    new, template, and maybe stop and strings. Last yields ("samples", rows of prompt, completion, answer, reward, kind) for
    the log: the first problem of each cell. All processes compute the same.
    A sample's noise is a function of NOISE and the problem's number alone: the same weights always have the same figure.
    """
    template, params = options["template"], ready(model, params, mesh)
    sampling = {k: options[k] for k in ("prompt_window", "new", "strings") if k in options}
    sampling["stop"] = options.get("stop") or chat.stop_ids(tokenizer, template)
    prompts = [chat.encode_prompt(r["prompt"], tokenizer, template) for r in records]
    samples, verifier = [], _verifier(rewards)
    kind = "accuracy" if verifier else "reward"
    for name, temperature in ((f"eval/{kind}", 1.0), (f"eval/{kind}_greedy", 0.0)):
        sampling["temperature"] = temperature
        texts, stopped = _answered(model, params, tokenizer, prompts, mesh, rows, sampling)
        asked = [{**record, "stopped": ended} for record, ended in zip(records, stopped, strict=True)]
        found = everywhere(rewards, asked, texts, **judging)
        scores = np.array([_applied(score.each[verifier]) if verifier else score.total for score in found])
        weights = [r.get("weight", 1.0) for r in records]
        yield from _interval(name, scores, weights, verifier)
        if verifier and temperature:
            yield "eval/reward", _mean([score.total for score in found], weights)
        for one in rewards if len(rewards) > 1 else ():
            yield f"eval/rewards/{one}{'' if temperature else '_greedy'}", _mean([_applied(score.each[one]) for score in found])
        cells = np.array([r.get("cell", "all") for r in records])
        for cell in dict.fromkeys(cells) if len(set(cells)) > 1 else ():
            yield from _interval(f"{name}/{cell}", scores[cells == cell], np.ones(np.sum(cells == cell)), verifier)
        for i in sorted({int(np.flatnonzero(cells == cell)[0]) for cell in cells}):
            shown = {"prompt": records[i]["prompt"], "completion": texts[i], "answer": records[i].get("answer", "")}
            samples.append({**shown, "reward": float(scores[i]), "kind": "sampled" if temperature else "greedy"})
    yield "samples", samples


def _interval(name: str, scores: np.ndarray, weights: Sequence[float], verifier: str | None) -> Iterator[tuple[str, float]]:
    """(name, the weighted mean of what a reward applies to), and for a verifier its interval as NAME_low and _high."""
    yield name, (mean := _mean(scores, weights))
    counted = [w for w, score in zip(weights, scores, strict=True) if np.isfinite(score)]
    yield from zip((f"{name}_low", f"{name}_high"), wilson(mean, counted), strict=True) if verifier and counted else ()


def names(records: Sequence[Mapping], rewards: Mapping) -> Iterator[str]:
    """The names of the figures that `graded` gives for these problems and rewards."""
    verifier, cells = _verifier(rewards), {r.get("cell", "all") for r in records}
    kind = "accuracy" if verifier else "reward"
    for suffix in ("", "_greedy"):
        yield from (f"eval/rewards/{one}{suffix}" for one in rewards if len(rewards) > 1)
        for part in ("", *(f"/{cell}" for cell in cells if len(cells) > 1)):
            yield from (f"eval/{kind}{suffix}{part}{end}" for end in ("", "_low", "_high")[: 3 if verifier else 1])
    yield "eval/reward"


def wilson(share: float, weights: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a share of problems that were solved, by Wilson's score: how far another draw of problems, each
    answered anew, would move it. Unlike the normal approximation it stays inside [0, 1] and has a width at 0 and 1.

    share: the mean of verdicts over problems with these weights. Unequal weights count as (sum w)^2 / sum w^2 equal ones.
    """
    z, weights = 1.96, np.asarray(weights, np.float64)
    n = weights.sum() ** 2 / np.sum(weights**2)
    centre, width = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, (centre - width) / (1 + z**2 / n)), min(1.0, (centre + width) / (1 + z**2 / n))


def _answered(model, params: Params, tokenizer, prompts: list, mesh, rows: int, sampling: dict) -> tuple[list[str], list[bool]]:
    """A completion of each prompt as text, so many rows at a time, and whether it ended by itself."""
    texts, stopped = [], []
    for first in range(0, len(prompts), rows):
        part = prompts[first : first + rows]
        part += [part[0]] * (rows - len(part))  # one shape, whatever is left
        found = complete(model, params, part, mesh=mesh, tokenizer=tokenizer, seed=NOISE, number=first, **sampling)
        texts, stopped = texts + answers(found, tokenizer), stopped + found.stopped.tolist()
    return texts[: len(prompts)], stopped[: len(prompts)]


def slide(examples: Sequence[dict], window: int) -> list[dict]:
    """Examples ({tokens, mask}: [n]) cut into pieces of at most `window` tokens, in which each masked token is once.

    Pieces of one example overlap by half a window, masked in the later one only past the overlap. Pieces without a masked token
    are left out. window: 2 or more.
    """
    pieces = []
    for example in examples:
        tokens, mask = example["tokens"], example["mask"]
        end = 0
        while end < len(tokens):
            start = max(0, end - window // 2)
            stop = min(start + window, len(tokens))
            fresh = mask[start:stop] & (np.arange(start, stop) >= max(end, 1))
            if fresh.any():
                pieces.append({"tokens": tokens[start:stop], "mask": fresh})
            end = stop
    return pieces


def perplexity(
    model: api.Model,
    path: str,
    *,
    window: int | None = None,
    train_on: str = "assistant",
    template: str | None = None,
    columns: str | Mapping[str, str] = "",
    bad_rows: str = "stop",
    rows: int = 8,
) -> Iterator[tuple[str, float | int]]:
    """(perplexity, nll in nats a token, tokens that were scored, documents, entropy, mean_token_accuracy) of a data file.

    window: tokens read at a time, None for the model's positions or WINDOW, whichever is less; rows: how many windows at once.
    columns and bad_rows are what a recipe's are.
    Raises UserError for whatever is wrong with the file, and for a window the model does not take.
    """
    model.need_tokenizer()
    most = model.transformer.arch.max_positions
    window = min(WINDOW, most) if window is None else window
    if not 2 <= window <= most:
        raise UserError(f"--window={window}: give 2 to {most} tokens, which is what the model takes.")
    # Cut by `slide`, not by the encoder, to which no example is too long.
    (part,) = mixture.read([path], "data", bad_rows == "skip")
    options = {"columns": mixture.pairs(columns, "columns"), "bad_rows": bad_rows}
    encoded = encoding.encode_all(part.records, model.tokenizer, template, train_on, window=2**31 - 1, **options)
    if (skipped := encoded.report["skipped"] + len(part.unread)) and jax.process_index() == 0:
        print(f"{path}: {skipped:,} skipped; the first: {(part.unread or [encoded.reason])[0]}", file=sys.stderr)
    check_ids(encoded.highest, model.transformer.arch.vocab, model.tokenizer, path)
    pieces = slide([encoded.examples[i] for i in range(len(encoded.lengths))], window)
    rows += -rows % (model.mesh.shape["data"] * model.mesh.shape["fsdp"])
    packed = source.rows(pieces, [len(p["tokens"]) for p in pieces], window, seed=0)
    local = sharding.local_rows(model.mesh, rows)
    batches = source.Batches(packed, rows, seed=0, shuffle=False, epochs=1, local=local)
    with sharding.use(model.mesh):
        judge = jax.jit(make_evaluation(model.forward, sft.nll))
        # Shown on a terminal alone: it may take minutes.
        turns = tqdm.tqdm(range(len(batches)), desc=path, unit="batch", disable=None)
        found = dict(held_out(judge, model.params, (batches() for _ in turns), model.mesh, rows))
    nll = found.pop("eval/loss")
    yield from {"perplexity": math.exp(nll), "nll": nll, "tokens": sum(int(p["mask"].sum()) for p in pieces)}.items()
    yield "documents", len(encoded.lengths)
    yield from ((name.removeprefix("eval/"), value) for name, value in found.items())


def solves(
    model: api.Model,
    name: str | Mapping,
    *,
    per_cell: int = 50,
    new: int = 64,
    reward: str = "",
    template: str | None = None,
    rows: int = 64,
    samples: int = 0,
    ks: Sequence[int] = (1,),
) -> Iterator[tuple[str, float]]:
    """(accuracy or reward, the same _greedy, and of each cell) of a task's test problems, see `graded`; or, of several
    `samples` of each problem, pass@k and maj@k for each k of ks, see evals/pass_at_k.py. First comes how many problems there
    are, last ("samples", rows) as there.

    name: of the task, or a dict with its keys; reward: a function in place of the task's own; new: the most tokens of an
    answer; rows: problems at a time. Raises UserError for an unknown task, or one whose problems the model has no room for.
    """
    model.need_tokenizer()
    entry = dict(name) if isinstance(name, Mapping) else {"name": name}
    task, name = tasks.opened(entry), entry["name"]
    if not callable(getattr(task, "test_records", None)):
        raise UserError(f"--task={name}: has no function test_records; CONTRIBUTING.md lists what a task has.")
    if not (reward or callable(getattr(task, "reward", None))):
        raise UserError(f"--task={name}: has no reward of its own; name one, as --reward=FILE.py:reward.")
    judges = tasks.rewards(task, name, reward)
    if not (records := task.test_records(per_cell)):
        raise UserError(f"--task={name}: has no test problems.")
    for i, record in enumerate(records):
        scoring.check_record(judges, record, f"--task={name}, test problem {i}")
    longest = max(len(chat.encode_prompt(r["prompt"], model.tokenizer, template)) for r in records)
    if (new := min(new, model.transformer.arch.max_positions - longest)) < 1:
        raise UserError(f"--task={name}: a prompt of {longest} tokens leaves no room for an answer in the model's positions.")
    options = {"prompt_window": longest, "new": new, "template": template}
    options["stop"] = chat.stop_ids(model.tokenizer, template, model.ends)
    asked, rows = (model.transformer, model.params, model.tokenizer, records), min(rows, len(records))
    if samples:
        found = pass_at_k.sampled(
            *asked, functools.partial(_verdicts, judges), model.mesh, n=samples, rows=rows, options=options, ks=ks,
            extract=getattr(task, "extract", None), name="pass" if _verifier(judges) else "best",
        )  # fmt: skip
    else:
        found = graded(*asked, judges, model.mesh, rows=rows, options=options)
    yield "problems", len(records)
    yield from ((key.removeprefix("eval/"), value) for key, value in found)


def _verifier(rewards: Mapping) -> str | None:
    """The name of the reward that is a verifier: its signature says that it gives a bool."""
    return next((name for name, (reward, _) in rewards.items() if _gives_bool(reward)), None)


def _gives_bool(reward: Callable) -> bool:
    return inspect.signature(reward).return_annotation in (bool, "bool")


def _verdicts(rewards: Mapping, records: list[dict], texts: list[str]) -> list[float]:
    """What a verifier says of each completion, if there is one among the rewards, else their sum."""
    name = _verifier(rewards)
    scores = everywhere(rewards, records, texts)
    return [_applied(score.each[name]) if name else score.total for score in scores]


def _applied(verdict: float | None) -> float:
    return float("nan") if verdict is None else verdict


def _mean(scores: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The mean over what a reward applies to, the scores that are not nan; nan where it applies to nothing."""
    scores = np.asarray(scores, float)
    weights = np.isfinite(scores) * (1.0 if weights is None else np.asarray(weights, float))
    return float(np.average(np.nan_to_num(scores), weights=weights)) if weights.any() else float("nan")


def _lm_eval(model: api.Model, tasks: list[str], limit: int | None) -> dict:
    try:
        from jaxpost.evals import harness
    except ModuleNotFoundError as e:
        if e.name != "lm_eval":
            raise
        raise UserError("--lm_eval: lm-eval is not installed; pip install 'jaxpost[eval]'.") from e
    return harness.evaluate(model, tasks, limit=limit)


def _tell(task: str, problems: int, samples: list[dict], most: int = 6) -> None:
    """Says what was asked, and shows a few of the completions."""
    if jax.process_index() == 0:
        print(f"{task}: {problems} test problems; the first completions:", file=sys.stderr)
        width = shutil.get_terminal_size((120, 24)).columns
        print(table.shown(samples[:most], width, colour=sys.stderr.isatty()), file=sys.stderr)


def main(_) -> None:
    """The command line; see the module's docstring."""
    given = flags.FLAGS
    (where,) = cli.required("model")
    if not (given.data or given.task or given.lm_eval):
        raise UserError("nothing to evaluate on: give --data=FILE, --task=NAME or --lm_eval=TASK. See --help.")
    model = api.load(where, dtype=given.dtype)
    template, found = given.template or None, {}
    if given.data:
        read = {"train_on": given.train_on, "columns": given.columns, "bad_rows": given.bad_rows, "template": template}
        try:
            found |= dict(perplexity(model, given.data, window=given.window, **read))
        except UserError as error:  # a recipe's settings are flags here
            raise UserError(re.sub(r"(--)?config\.(columns|template)\b", r"--\2", str(error))) from error
        if jax.process_index() == 0:
            print(f"{given.data}: {found['documents']:,} documents, {found['tokens']:,} scored tokens", file=sys.stderr)
    if given.task:
        what, options = entry_of(given.task, "--task"), {"per_cell": given.per_cell, "new": given.new, "samples": given.samples}
        if not all(k.isdigit() for k in given.k):
            raise UserError(f"--k={','.join(given.k)}: give whole numbers, with commas between several.")
        options |= {"reward": given.reward, "template": template, "ks": [int(k) for k in given.k]}
        found |= dict(solves(model, what, **options))
        _tell(given.task, found["problems"], found.pop("samples"))
    if given.lm_eval:
        found["lm_eval"] = _lm_eval(model, given.lm_eval, given.limit)
    if jax.process_index() == 0:
        print(json.dumps(found, indent=2))


ABOUT = """Evaluates a model, and prints one JSON object.

    python -m jaxpost.evaluate --model=FOLDER --data=FILE.jsonl
    python -m jaxpost.evaluate --model=/tmp/quickstart --task=arithmetic --per_cell=20
    python -m jaxpost.evaluate --model=FOLDER --task='{"name": "gsm8k", "data": "F.jsonl"}' --samples=16 --k=1,4,16
    python -m jaxpost.evaluate --model=FOLDER --lm_eval=arc_easy --lm_eval=my_task.yaml
"""

if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "Folder of the model: Hugging Face's, a workdir of jaxpost.train, or a checkpoint in one."
    )
    flags.DEFINE_string("data", None, "File to give the perplexity of; its rows are recognised as in training.")
    flags.DEFINE_integer("window", None, f"Tokens read at a time (default: {WINDOW}, or what the model takes).", lower_bound=2)
    flags.DEFINE_string("columns", "", "Columns of other names, as in training: prompt=problem,completion=solution.")
    flags.DEFINE_enum("bad_rows", "stop", encoding.BAD_ROWS, "What becomes of bad rows: stop, or skip and count.")
    flags.DEFINE_enum("train_on", "assistant", TRAIN_ON, "Which tokens of a conversation count, as in training.")
    flags.DEFINE_string("template", "", "Chat template: a name, or Jinja; empty is the tokenizer's own.")
    flags.DEFINE_string("task", None, "Task to measure the accuracy on: a name, a file of your own, or JSON with its keys.")
    flags.DEFINE_integer("samples", 0, "Answers to each of the task's problems, for pass@k and maj@k; 0 is one.", lower_bound=0)
    flags.DEFINE_list("k", ["1"], "The k of pass@k and maj@k, with commas between several.")
    flags.DEFINE_integer("per_cell", 50, "Test problems of each of the task's cells.", lower_bound=1)
    flags.DEFINE_integer("new", 64, "The most tokens of an answer.", lower_bound=1)
    flags.DEFINE_string("reward", "", "A function (record, completion) -> float in place of the task's own.")
    flags.DEFINE_multi_string("lm_eval", [], "A task of lm-eval, by name or file; for several, give it several times.")
    flags.DEFINE_integer("limit", None, "Documents of each lm-eval task (default: all).", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", sorted(loading.DTYPES), "The computation's number format.")
    cli.run(main, ABOUT, model=True)
