"""What each source reads of a stage's settings: one that would be ignored is refused, and data for rollouts are prompts."""

from collections.abc import Mapping
from typing import Any

from jaxpost.errors import UserError

# The task of recipes for reinforcement, where nobody names another: `data` gives the prompts in its place.
GSM8K = {"name": "gsm8k", "data": "tfds:gsm8k/train", "test": ""}  # "" tests on a tenth of data
_OF_FILES = ("data", "eval_data", "columns", "annotations", "train_on")  # read where batches come from files


def adapted(settings: dict, own: Mapping, defaults: Mapping, place: str) -> dict:
    """A stage's settings, with the task `prompts` for rollouts or samples of the prompts that `data` names.

    own: what was given for this stage, which may be all; what stands around several stages another one may read. place: as
    "config.sft". Raises UserError for what the stage's source would not read.
    """
    source, given = settings["source"], {k for k in own if settings.get(k) != defaults.get(k)}
    if source in ("rollouts", "samples") and "data" in given:
        settings = _of_prompts(settings, given, place)
        given -= {"data", "eval_data", "columns"}
    if unread := [key for key in _OF_FILES if key in given] if source == "rollouts" else []:
        raise UserError(f"{place}.{unread[0]}: {settings[unread[0]]!r} is not read by source={source!r}; leave it out.")
    return settings


def _of_prompts(settings: dict, given: set[str], place: str) -> dict:
    data: Any = settings["data"]
    if settings["task"] not in ({}, GSM8K):
        raise UserError(
            f"{place}.data: {data!r}; the prompts of source={settings['source']!r} are those of {place}.task, "
            f"{settings['task'].get('name')}. Leave data out, or give task=dict(name='prompts', data=...)."
        )
    if not settings["reward"]:
        raise UserError(f"{place}.reward: a file of prompts has no reward of its own; name one, as mine.py:reward.")
    if not isinstance(data, str) or not isinstance(settings["eval_data"], str) or "=" in data.rpartition("/")[2]:
        raise UserError(f"{place}.data: {data!r}; prompts are files with commas between them, without weights.")
    task = {"name": "prompts", "data": data, "test": settings["eval_data"], "columns": settings["columns"]}
    task |= {"held_out": settings["held_out"]} if settings["held_out"] else {}
    return {**settings, "task": task, "data": "", "eval_data": "", "columns": ""}
