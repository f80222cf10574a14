"""Reinforcement learning by Tunix's GRPOLearner with its own sampler. The reference is a second model.

It draws with the same noise at every step unless told otherwise, so each step gets a seed.
"""


def run(job: dict, clock) -> dict:
    """Trains on completions of the job's prompts, in their order; a step is over when the new weights are there."""
    import dataclasses

    import jax
    import numpy as np
    from flax import nnx
    from grpo import trl
    from sft import tunix
    from transformers import AutoTokenizer
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner

    mesh, tokenizer = tunix.mesh(), AutoTokenizer.from_pretrained(job["model"])
    actor, reference = (tunix.network(job["model"], mesh) for _ in range(2))
    setup = {"actor": actor, "reference": reference, "tokenizer": tokenizer}
    cluster = rl_cluster.RLCluster(**setup, cluster_config=settings(job, mesh, tunix.optimizer(job)))
    algorithm = grpo_learner.GRPOConfig(num_generations=job["group"], beta=job["beta"])

    def rewards(prompts, completions, **_):
        return [trl.reward(text) for text in completions]

    learner = grpo_learner.GRPOLearner(rl_cluster=cluster, reward_fns=rewards, algo_config=algorithm)
    generate, step, told = cluster.rollout.generate, learner._run_global_step, cluster.actor_trainer._post_process_train_step
    texts = [[" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in rows.tolist()] for rows in np.load(job["rows"])]
    lengths, first = [], {}

    def generated(prompts, options, **more):
        at = len(clock.ends)
        found = generate(prompts, dataclasses.replace(options, seed=jax.random.PRNGKey(at)), **more)
        wanted = [tokenizer(text)["input_ids"] for text in texts[at] for _ in range(job["group"])]
        assert found.left_padded_prompt_tokens.tolist() == wanted, "Tunix reads other tokens as the prompts"
        lengths.extend(len(ids) for ids in found.tokens)
        return found

    def noted(aux):
        first.setdefault("aux", aux)
        told(aux)

    def stepped(*given, **more):
        step(*given, **more)
        jax.block_until_ready(nnx.state(actor))
        clock.tick()

    cluster.rollout.generate, learner._run_global_step = generated, stepped
    cluster.actor_trainer._post_process_train_step = noted
    with mesh:
        learner.train([{"prompts": np.array(rows)} for rows in texts])
    loss = float(first["aux"]["pg_loss"] + job["beta"] * first["aux"]["kl_loss"])
    count = sum(x.size for x in jax.tree.leaves(nnx.state(actor, nnx.Param)))
    return {"proof": trl.proof(lengths, loss, float(first["aux"]["kl"]), count)}


def settings(job: dict, mesh, optimizer):
    """One device for all of its roles, and one optimizer step a batch."""
    from tunix.rl import rl_cluster
    from tunix.rl.rollout import base_rollout

    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=job["new"],
        max_prompt_length=job["prompt"],
        kv_cache_size=job["prompt"] + job["new"] + 1,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
    )
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=10**9,
        max_steps=job["steps"],
        mini_batch_size=job["prompts"],
        train_micro_batch_size=job["prompts"],
    )
    return rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh),
        rollout_engine="vanilla",
        offload_to_cpu=False,
        rollout_config=rollout,
        training_config=training,
    )
