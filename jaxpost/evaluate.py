"""Evaluation: an Eval is a function that yields (name, value).

`held_out` gives the objective's loss and metrics on data it did not train on; `accuracy` has the model answer a task's test
problems, sampled at temperature 1 and greedily, and lets the task's own reward judge.
"""

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from jaxpost import metrics, sharding
from jaxpost.data import chat
from jaxpost.sampling.decode import answers, complete
from jaxpost.types import Params


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


def accuracy(
    model, params: Params, tokenizer, records: list[dict], reward: Callable, mesh, *, rows: int, options: dict, step: int
) -> Iterator[tuple[str, float | list]]:
    """(eval/accuracy, mean reward of one sample a problem), (eval/accuracy_greedy, ...), the same for each cell as
    <name>/<cell>.

    records: dicts with prompt, and maybe answer, cell (else "all") and a weight in the overall mean. rows: how many are
    completed at a time; options: prompt_window, new, template. Last yields ("samples", rows of prompt, completion, answer,
    reward, kind) for the log: the first problem of each cell. All processes compute the same.
    """
    template = options["template"]
    prompts = [chat.encode_prompt([{"role": "user", "content": r["prompt"]}], tokenizer, template) for r in records]
    samples = []
    for name, temperature in (("eval/accuracy", 1.0), ("eval/accuracy_greedy", 0.0)):
        texts = []
        for first in range(0, len(prompts), rows):
            part = prompts[first : first + rows]
            found = complete(
                model,
                params,
                [*part, *[part[0]] * (rows - len(part))],  # one shape, whatever is left
                mesh=mesh,
                prompt_window=options["prompt_window"],
                new=options["new"],
                stop=chat.stop_ids(tokenizer, template),
                temperature=temperature,
                seed=first,
                step=step,
            )
            texts += answers(found, part, tokenizer)
        scores = np.array([reward(r, text) for r, text in zip(records, texts, strict=True)])
        yield name, float(np.average(scores, weights=[r.get("weight", 1.0) for r in records]))
        cells = np.array([r.get("cell", "all") for r in records])
        for cell in dict.fromkeys(cells):
            yield f"{name}/{cell}", float(scores[cells == cell].mean())
            i = int(np.flatnonzero(cells == cell)[0])
            shown = {
                "prompt": records[i]["prompt"],
                "completion": texts[i],
                "answer": records[i].get("answer", ""),
                "reward": float(scores[i]),
            }
            samples.append(shown | {"kind": "sampled" if temperature else "greedy"})
    yield "samples", samples
