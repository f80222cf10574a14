"""Completions by Tunix's sampler. It takes texts, and each of a group's completions as a prompt of its own."""


def run(job: dict, clock) -> dict:
    """Completes the job's prompts, those of a step in a call."""
    import numpy as np
    from sft import tunix
    from transformers import AutoTokenizer
    from tunix.generate import sampler

    mesh, tokenizer = tunix.mesh(), AutoTokenizer.from_pretrained(job["model"])
    model, lengths = tunix.network(job["model"], mesh), []
    c = model.config
    sizes = {"num_layers": c.num_layers, "num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
    cache = sampler.CacheConfig(cache_size=job["prompt"] + job["new"] + 1, **sizes)
    # Its default is greedy; a top_p has it draw.
    options = {"max_generation_steps": job["new"], "max_prompt_length": job["prompt"], "temperature": 1.0, "top_p": 1.0}
    with mesh:
        sample = sampler.Sampler(model, tokenizer, cache)
        for i, rows in enumerate(np.load(job["rows"]).tolist()):
            rows = [ids for ids in rows for _ in range(job["group"])]
            texts = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in rows]
            found = sample(texts, **options, seed=i)
            assert found.padded_prompt_tokens.tolist() == rows, "Tunix reads other tokens as the prompts"
            lengths += [len(ids) for ids in found.tokens]
            clock.tick()
    return {"proof": {"shortest": min(lengths), "longest": max(lengths), "completions a call": len(found.tokens)}}
