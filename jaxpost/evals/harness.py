"""lm-eval asks, jaxpost answers: the one adapter between the two (extra [eval]; it needs no torch).

    python -m jaxpost.evaluate --model=FOLDER --lm_eval=task.yaml
    evals={"arc": {"name": "harness.lm_eval", "tasks": ["arc_easy"], "limit": 200}}

lm-eval has three questions. How likely is a continuation after a context, and would greedy decoding have written it
(`loglikelihood`)? How likely is a document, to be answered in windows if it is longer than the model (`loglikelihood_rolling`)?
How does the model go on (`generate_until`)? Text becomes tokens as in lm-eval's own adapter for `transformers`, so the figures
compare: the tokenizer's special tokens are added where it adds any, context and continuation are tokenised as one text and then
parted, and an empty context is the beginning-of-text token. One thing differs: of a document only its own tokens are scored,
where that adapter also asks how likely the beginning-of-text token is after itself.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from jaxpost.errors import UserError

# Rows are padded to a multiple of this, so that texts of about one length share a compiled program.
_BUCKET = 64

# The names that tasks give to the most tokens of a completion, in lm-eval's order.
_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Adapter(TemplateLM):
    """An lm-eval model around what `jaxpost.load` gives. rows: texts that are scored or completed at a time."""

    def __init__(self, model: Any, rows: int = 8):
        super().__init__()
        model.need_tokenizer()
        self.model, self.tokenizer, self.rows = model, model.tokenizer, rows
        self.max_length = model.max_positions

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without context is conditioned on."""
        bos, eos = self.tokenizer.bos_token_id, self.eot_token_id
        if bos is None and eos is None:
            raise UserError(
                "lm-eval: the tokenizer has neither a bos_token nor an eos_token to begin a text with; give it one."
            )
        return eos if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text; one that spells out the beginning-of-text token does not get a second."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's template renders it."""
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, continue_final_message=not add_generation_prompt, **options)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches tell tokenizers apart by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each (_, context ids, continuation ids); the context loses its beginning where
        the two are longer than the model."""
        sequences = []
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"lm-eval: a continuation of {len(continuation)} tokens after {len(context)}; 1 to {self.max_length} can "
                    "be scored, after 1 at least."
                )
            # The last token is only scored and never read, so one more than the model takes.
            sequences.append(([*context, *continuation][-self.max_length - 1 :], len(continuation)))
        answers: list = [None] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
        for first in range(0, len(order), self.rows):
            chosen = order[first : first + self.rows]
            ids = [sequences[i][0] for i in chosen]
            width = min(self.max_length + 1, len(ids[0]) + -len(ids[0]) % _BUCKET)
            tokens = np.zeros((self.rows, width), np.int32)
            for row, sequence in zip(tokens, ids, strict=False):
                row[: len(sequence)] = sequence
            lengths = np.array([*map(len, ids), *[1] * (self.rows - len(ids))])
            scores = {k: np.asarray(v) for k, v in self.model.scores(tokens, lengths).items()}
            for place, i in enumerate(chosen):
                scored = slice(len(sequences[i][0]) - sequences[i][1], len(sequences[i][0]))
                total = float(scores["logps"][place, scored].astype(np.float64).sum())
                answers[i] = (total, bool(scores["correct"][place, scored].all()))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text: every token scored once, in windows that overlap only where the last one must."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(math.fsum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The completion of each context, up to the first of its stop strings, which it does not hold."""
        answers: list = [None] * len(requests)
        kinds: dict[tuple[float, int], list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(self._manner(request.args[1]), []).append(i)
        for (temperature, new), members in kinds.items():
            for first in range(0, len(members), self.rows):
                part = members[first : first + self.rows]
                # The end of a context that is too long is what the completion follows.
                prompts = [np.array(self.tok_encode(requests[i].args[0])[new - self.max_length :], np.int32) for i in part]
                completions = self.model.complete(prompts, new=new, temperature=temperature, seed=first)
                for i, ids in zip(part, completions, strict=True):
                    # Decoded by itself, as in lm-eval's own adapter: some tokenizers then leave out its first space.
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    until = requests[i].args[1].get("until") or []
                    cuts = [text.find(stop) for stop in ([until] if isinstance(until, str) else until) if stop]
                    answers[i] = text[: min([c for c in cuts if c >= 0], default=len(text))]
        return answers

    def _manner(self, request: dict) -> tuple[float, int]:
        """(temperature, most new tokens) of a request. Raises UserError for what it asks beyond these, and for no room."""
        sampled = bool(request.get("do_sample"))
        ignored = () if sampled else ("top_p", "top_k")  # they do not change which token is the likeliest
        if unknown := request.keys() - {"until", "do_sample", "temperature", *_NEW, *ignored}:
            raise UserError(f"lm-eval: the task asks for {min(unknown)}, which jaxpost's sampler does not have.")
        new = int(next((request[k] for k in _NEW if request.get(k) is not None), 256))
        if not 0 < new < self.max_length:
            raise UserError(f"lm-eval: {new} new tokens leave no room for a context in {self.max_length}; set max_gen_toks.")
        return float(request.get("temperature", 1.0)) if sampled else 0.0, new


def lm_eval(model: Any, *, tasks: Sequence[str], limit: int | None = None, rows: int = 8) -> Iterator[tuple[str, float]]:
    """(TASK/metric, value) of lm-eval's tasks, as `evaluate` gives them; the eval of a recipe."""
    for task, figures in evaluate(model, tasks, rows=rows, limit=limit).items():
        yield from ((f"{task}/{metric}", value) for metric, value in figures.items())


@functools.cache
def _index() -> TaskManager:
    return TaskManager()  # it reads thousands of files


def _manager(tasks: Sequence[str]) -> TaskManager:
    """lm-eval's index of tasks. Raises UserError for a task that is not in it, nor a file."""
    manager = _index()
    for task in tasks:
        if task not in manager.task_index and not Path(task).is_file():
            raise UserError(f"lm_eval={task}: no file, and lm-eval knows no task, group or tag of that name.")
    return manager


def _check(model: Any, tasks: Sequence[str], limit: int | None = None, rows: int = 8) -> None:
    model.need_tokenizer()
    _manager(tasks)


lm_eval.check = _check


def evaluate(model: Any, tasks: Sequence[str], *, rows: int = 8, limit: int | None = None) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of lm-eval's tasks, each a name or the path of a task file (.yaml).

    rows: texts at a time; limit: documents of each task. Standard errors are left out: lm-eval draws some of them from forked
    processes, which a process that runs jax must not start. Raises UserError for a task that lm-eval does not know.
    """
    options = {"task_manager": _manager(tasks), "limit": limit, "log_samples": False, "bootstrap_iters": 0}
    results = simple_evaluate(Adapter(model, rows), tasks=list(tasks), **options)["results"]
    return {
        task: {k.removesuffix(",none"): float(v) for k, v in values.items() if isinstance(v, (int, float))}
        for task, values in results.items()
    }
