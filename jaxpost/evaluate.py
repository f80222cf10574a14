"""Evaluation from the command line: a thin command over evals/, each a function that yields (name, value).

python -m jaxpost.evaluate --model=FOLDER --data=FILE.jsonl        perplexity of a file (evals/perplexity.py)
python -m jaxpost.evaluate --model=WORKDIR --task=arithmetic       a task's accuracy, by generation (evals/accuracy.py)
python -m jaxpost.evaluate --model=FOLDER --lm_eval=task.yaml      lm-eval's tasks (evals/harness.py, extra [eval])
python -m jaxpost.evaluate --model=FOLDER --evals='{"mine": {"name": "FILE.py:figures"}}'     any evals, as config.evals
"""

import json
import re
import shutil
import sys

import jax
from absl import flags

from jaxpost import api
from jaxpost.config import cli
from jaxpost.config.resolve import entry_of, find
from jaxpost.data import encoding
from jaxpost.data.chat import TRAIN_ON
from jaxpost.errors import UserError
from jaxpost.evals.accuracy import accuracy
from jaxpost.evals.perplexity import WINDOW, perplexity
from jaxpost.models import computing
from jaxpost.reporting import table
from jaxpost.stages.evaluation import configured, first_of_each_cell, run_evals


def figures(model: api.Model, args) -> dict:
    """{figure: value} of all that the flags ask for. Raises UserError, in the words of the flags, for what is wrong."""
    template = args.template or None
    try:
        results = _of_flags(model, args, template)
    except UserError as error:  # a recipe's settings and an eval's keywords are flags here
        message = re.sub(r"(--)?config\.(columns|template)\b", r"--\2", str(error))
        raise UserError(re.sub(r"(?<![\w.-])(window|task|reward|samples|k|lm_eval)(?==)", r"--\1", message)) from error
    if args.evals:
        named, rows = run_evals(model, configured(_entries(args.evals), model, template=template, place="--evals"))
        results |= named
        if rows:
            problems = {(row["eval"], row.get("problem", i)) for i, row in enumerate(rows)}
            _show(f"--evals: {len(problems)} rows; the first", first_of_each_cell(rows))
    return results


def _of_flags(model: api.Model, args, template: str | None) -> dict:
    results = {}
    if args.data:
        read = {"train_on": args.train_on, "columns": args.columns, "bad_rows": args.bad_rows, "template": template}
        results |= dict(perplexity(model, data=args.data, window=args.window, **read))
        if jax.process_index() == 0:
            print(f"{args.data}: {results['documents']:,} documents, {results['tokens']:,} scored tokens", file=sys.stderr)
    if args.task:
        options = {"per_cell": args.per_cell, "new": args.new, "samples": args.samples, "ks": [int(k) for k in args.k]}
        options |= {"task": entry_of(args.task, "--task"), "reward": args.reward, "template": template}
        results |= dict(accuracy(model, **options))
        _show(f"{args.task}: {results['problems']} test problems; the first completions", results.pop("samples"))
    if args.lm_eval:
        results["lm_eval"] = find("harness.evaluate", "evals")(model, args.lm_eval, limit=args.limit)
    return results


def _entries(text: str) -> dict:
    """The evals of --evals. Raises UserError for a text that is no JSON object."""
    entries = entry_of(text, "--evals")
    if not isinstance(entries, dict):
        raise UserError(f'--evals={text}: give JSON, as {{"mine": {{"name": "accuracy", "task": "arithmetic"}}}}.')
    return entries


def _show(title: str, samples: list[dict], most: int = 6) -> None:
    """Prints a few of the samples."""
    if jax.process_index() == 0:
        print(f"{title}:", file=sys.stderr)
        width = shutil.get_terminal_size((120, 24)).columns
        print(table.shown(samples[:most], width, colour=sys.stderr.isatty()), file=sys.stderr)


def main(_) -> None:
    """The command line; see the module's docstring."""
    args = flags.FLAGS
    (where,) = cli.required("model")
    if not (args.data or args.task or args.lm_eval or args.evals):
        raise UserError("nothing to evaluate on: give --data=FILE, --task=NAME, --lm_eval=TASK or --evals=JSON. See --help.")
    if not all(k.isdigit() for k in args.k):
        raise UserError(f"--k={','.join(args.k)}: give whole numbers, with commas between several.")
    results = figures(api.load(entry_of(where, "--model"), dtype=args.dtype), args)
    if jax.process_index() == 0:
        print(json.dumps(results, indent=2))


ABOUT = """Evaluates a model, and prints one JSON object.

    python -m jaxpost.evaluate --model=FOLDER --data=FILE.jsonl
    python -m jaxpost.evaluate --model=/tmp/quickstart --task=arithmetic --per_cell=20
    python -m jaxpost.evaluate --model=FOLDER --task='{"name": "gsm8k", "data": "F.jsonl"}' --samples=16 --k=1,4,16
    python -m jaxpost.evaluate --model=FOLDER --lm_eval=arc_easy --lm_eval=my_task.yaml
    python -m jaxpost.evaluate --model=FOLDER --evals='{"mine": {"name": "FILE.py:figures", "limit": 9}}'
"""

if __name__ == "__main__":
    flags.DEFINE_string(
        "model",
        None,
        "Folder of the model: Hugging Face's, a workdir of jaxpost.train, or a checkpoint in one; or JSON of a recipe's model.",
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
    flags.DEFINE_string("evals", "", 'Evals as a recipe\'s: JSON of {NAME: {"name": function, ...}}; figures are NAME/FIGURE.')
    flags.DEFINE_integer("limit", None, "Documents of each lm-eval task (default: all).", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", sorted(computing.DTYPES), "The computation's number format.")
    cli.run(main, ABOUT, model=True)
