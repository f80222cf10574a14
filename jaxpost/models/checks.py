"""What is checked of a model's weights before they are made, and once they are read."""

import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models import hf, protocol
from jaxpost.storage import host
from jaxpost.types import Params


def check_finite(params: Params, folder) -> None:
    """Raises UserError for a checkpoint with NaN or infinity in its weights, naming the first such weight."""
    named = {sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    named = {name: x for name, x in named.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    finite = jax.device_get(jax.jit(lambda leaves: {name: jnp.isfinite(x).all() for name, x in leaves.items()})(named))
    if bad := [name for name in named if not finite[name]]:
        raise UserError(
            f"{folder}: {len(bad)} weights have values that are NaN or infinite, first {bad[0]}: its training diverged. Take "
            "an earlier checkpoint, or train again with a lower learning rate."
        )


def parameters(model: protocol.Model) -> int:
    """How many parameters a model has, without an adapter."""
    if hasattr(model, "arch"):
        return model.arch.parameters()
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.PRNGKey(0)))))


def check_memory(model: protocol.Model) -> None:
    """Raises UserError for a fresh model whose float32 weights alone exceed the memory of all devices of this machine."""
    device = jax.local_devices()[0]
    room = (device.memory_stats() or {}).get("bytes_limit", 0) * jax.local_device_count()
    room = (host.memory() if device.platform == "cpu" else room) * jax.process_count()
    if room and (needed := 4 * parameters(model)) > room:
        sizes = f" ({hf.sizes(model.arch)})" if hasattr(model, "arch") else ""
        raise UserError(
            f"config.model: {parameters(model):,} parameters{sizes} take {needed / 2**30:,.0f} GiB in float32, and "
            f"there are {room / 2**30:,.0f} GiB of memory; make it smaller."
        )
