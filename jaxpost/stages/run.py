"""What the stages of a run share: where it writes, its mesh, and what earlier stages have made."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from jaxpost.config import links
from jaxpost.errors import UserError
from jaxpost.models import loading, protocol
from jaxpost.recipe import plain
from jaxpost.storage import checkpoint


class Output(NamedTuple):
    """What a stage hands on to later ones: its rows (a pattern of files), the folders of its columns with commas between, its
    figures, the ModelSpec of its weights, the seconds that it took and the tokens that it trained on; of columns, a digest of
    the rows that they are `of`; `spent`, the tokens "learned" from, "generated" and "scored" by a model, and optimizer "steps".
    Until the stage has run `pending` is true, `trial` has rows such as it will give, and `shapes` the columns that it will make
    of a batch.
    """

    rows: str = ""
    columns: str = ""
    figures: Mapping[str, float] = {}
    spec: Any = None
    seconds: float = 0.0
    tokens: int = 0
    spent: Mapping[str, int] = {}
    pending: bool = False
    trial: tuple[dict, ...] = ()
    of: str = ""
    shapes: Mapping[str, Any] = {}


class Run(NamedTuple):
    """workdir: of checkpoints and figures; root: the folder of artefacts; stop: a StopRequest; outputs: {stage: what it hands
    on}, pending before it has run; evaluated: the latest evaluation of each stage in this process.
    """

    workdir: epath.Path
    root: epath.Path
    mesh: Any
    stop: Any
    outputs: dict[str, Output]
    evaluated: dict

    def described(self, s) -> loading.ModelSpec:
        """The model that a stage's settings name, with a tokenizer. Raises UserError where either is missing or broken."""
        spec = described(s, self.mesh)
        check(spec)
        return spec

    def starting(self, spec: loading.ModelSpec, s) -> loading.ModelSpec:
        """The model that a stage starts from: the result of the stage that its settings name, or its own."""
        if not s.start:
            return spec
        return dataclasses.replace(spec, folder=checkpoint.find_step(self.workdir / "checkpoints" / s.start), hub="")

    def filled(self, s) -> ConfigDict:
        """A stage's settings with the files and folders of earlier stages in place of their @names."""
        for key in ("data", "eval_data", "annotations"):
            assert not self.pending(plain(s[key])), f"{key}: {s[key]} is not made yet"
        files = {key: links.filled(plain(s[key]), lambda name: self.outputs[name].rows) for key in ("data", "eval_data")}
        folders = plain(s.annotations)
        if isinstance(folders, str):
            folders = ",".join(self.folders(folders))
        return ConfigDict({**plain(s), **files, "annotations": folders})

    def without_pending(self, s) -> ConfigDict:
        """A stage's settings without the evaluation's rows and the columns that earlier stages are still to make."""
        s = ConfigDict(plain(s))
        for key in ("eval_data", "annotations"):
            if self.pending(plain(s[key])):
                with s.ignore_type():
                    s[key] = ""
        return self.filled(s)

    def folders(self, value: str) -> list[str]:
        """The folders of columns that a setting names, with commas between several; an @NAME stands for an earlier stage's."""
        parts = [part.strip() for part in value.split(",") if part.strip()]
        return [
            folder for part in parts for folder in (self.outputs[part[1:]].columns.split(",") if part[0] == "@" else [part])
        ]

    def models(self, s) -> Callable[[str], loading.ModelSpec]:
        """name -> ModelSpec, of the models that a stage's settings name besides its own: an earlier stage's as @NAME."""

        def described(name: str) -> loading.ModelSpec:
            if not name.startswith("@"):
                return loading.describe(name, "", s.dtype, text=False)
            output = self.outputs.get(name[1:])
            if output is None or output.spec is None:
                raise UserError(f"config: {name} is no earlier stage that makes weights.")
            if output.pending:
                return output.spec
            folder = checkpoint.find_step(self.workdir / "checkpoints" / name[1:])
            return dataclasses.replace(output.spec, folder=folder, hub="")

        return described

    def pending(self, value: Any) -> list[Output]:
        """The outputs of stages that a setting names (as @NAME in a text, a list, or a dict's keys) and that have not run."""
        return [self.outputs[name] for name in links.references(value) if self.outputs[name].pending]


def check(spec: loading.ModelSpec) -> None:
    """Raises UserError for a model whose files do not fit it, and for one without a tokenizer."""
    loading.check(spec)
    if spec.tokenizer is None:
        raise UserError(
            "config.tokenizer: the model comes without one; name a folder that has one, or a function that makes one."
        )


def check_room(spec: loading.ModelSpec, r) -> None:
    """Raises UserError for a model that cannot be sampled, and for settings of rollouts whose prompts and completions together
    are longer than it takes.
    """
    protocol.check(spec.transformer, "config.model: completions are sampled, and", protocol.Sampled)
    most = loading.max_positions(spec)
    if (longest := r.prompt_window + r.new) > most:
        raise UserError(
            f"config.rollouts: prompt_window + new = {longest} tokens, but the model takes {most}; give less, as "
            f"--config.rollouts.prompt_window={most // 4} --config.rollouts.new={most // 4}."
        )


def described(s, mesh) -> loading.ModelSpec:
    """The model that a stage's settings name; its weights and its tokenizer may be missing."""
    options = {"attention": s.attention, "attend": s.attend, "device": mesh.devices.flat[0]}
    return loading.describe(plain(s.model), s.tokenizer, s.dtype, s.remat, plain(s.adapter), **options)
