"""Supervised fine-tuning by Tunix's PeftTrainer on a model without adapters, which is a full fine-tune; it packs nothing.

Its hook for a step comes while the next one is under way, and the first when the second has been dispatched.
"""

import json
from pathlib import Path


def network(folder: str, mesh):
    """The folder's weights as Tunix's Qwen 3."""
    import jax.numpy as jnp
    from tunix.models.qwen3 import model, params

    c = json.loads((Path(folder) / "config.json").read_text())
    config = model.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        rope_theta=int(c["rope_parameters"]["rope_theta"]),
        norm_eps=c["rms_norm_eps"],
        use_tied_embedding=c["tie_word_embeddings"],
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    return params.create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.float32)


def mesh():
    """One device."""
    import jax

    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def optimizer(job: dict):
    """The optimizer that all share."""
    import optax

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(job["lr"], b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0))


def hook(clock):
    """A hook that ticks."""
    from tunix.sft import hooks

    def ignored(*_):
        pass

    def told(self, trainer, step, loss):
        clock.tick(loss)

    others = ("on_train_start", "on_train_end", "on_train_step_start", "on_eval_step_start", "on_eval_step_end")
    return type("Told", (hooks.TrainingHooks,), dict.fromkeys(others, ignored) | {"on_train_step_end": told})()


def run(job: dict, clock) -> None:
    """Trains on the job's rows, in their order."""
    import numpy as np
    from tunix.sft import peft_trainer
    from tunix.sft import utils as masks

    rows = np.load(job["rows"])
    ones = np.ones(rows.shape[1:], bool)
    data = [peft_trainer.TrainingInput(input_tokens=batch, input_mask=ones) for batch in rows]

    def inputs(x):
        position = masks.build_positions_from_mask(x.input_mask)
        attention = masks.make_causal_attn_mask(x.input_mask)
        columns = {"input_tokens": x.input_tokens, "input_mask": x.input_mask}
        return {**columns, "positions": position, "attention_mask": attention}

    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=len(rows))
    with mesh() as on:
        trainer = peft_trainer.PeftTrainer(network(job["model"], on), optimizer(job), config).with_gen_model_input_fn(inputs)
        trainer.with_training_hooks(hook(clock))
        trainer.train(data)
