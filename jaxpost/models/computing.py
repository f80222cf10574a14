"""How a model computes: a recipe's settings dtype, remat and attention, checked against the device."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxpost.config.resolve import nearest
from jaxpost.errors import UserError
from jaxpost.models.attention import KERNELS
from jaxpost.models.transformer import REMAT

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ATTEND = ("causal", "prefix", "whole")  # what a token sees of its document
DEFAULTS = {"dtype": "float32", "remat": "none", "attention": "auto"}


def check(dtype: str, remat: str, attend: str = "") -> None:
    """Raises UserError for a word that is none of the choices."""
    for value, choices, key in ((dtype, DTYPES, "dtype"), (remat, REMAT, "remat"), (attend or ATTEND[0], ATTEND, "attend")):
        if value not in choices:
            raise UserError(f"config.{key}: unknown {value!r}.{nearest(str(value), choices)}")


def number_format(dtype: str, device):
    """The dtype to compute in: float32 where the device has no bfloat16 (GPUs before compute capability 8)."""
    capability = getattr(device, "compute_capability", None)
    if dtype == "bfloat16" and device.platform == "gpu" and capability and float(capability) < 8:
        print(f"config.dtype: {device.device_kind} has no bfloat16; computing in float32 instead.", file=sys.stderr)
        return DTYPES["float32"]
    return DTYPES[dtype]


def kernel(name: str, device) -> str:
    """The attention kernel that a recipe names, checked against the device that will compute."""
    fast = KERNELS.get(device.platform, "xla")
    if name not in (choices := ("auto", "xla", *KERNELS.values())):
        raise UserError(f"config.attention: unknown {name!r}.{nearest(name, choices)}")
    if name not in ("auto", "xla", fast):
        raise UserError(f"config.attention: {name!r} does not run on {device.device_kind}; leave it at auto, or take xla.")
    return fast if name == "auto" else name


def keywords(name: str, function: Callable, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that the function which makes a model has keywords for. Raises UserError for another that is not
    at its default.
    """
    takes = inspect.signature(function).parameters
    for key, value in settings.items():
        if key not in takes and value != DEFAULTS[key]:
            raise UserError(
                f"config.{key}: {value!r} is not read by {name}; leave it out, or give the function a keyword {key}."
            )
    return {key: value for key, value in settings.items() if key in takes}
