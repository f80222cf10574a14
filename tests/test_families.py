"""Every family against `transformers`: logits, greedy decoding, files written as they were read, fields honoured or refused.

The golden values come from tests/golden/make_families.py. One case a family runs in the quick suite, the others are slow.
"""

import dataclasses
import json
import re
from pathlib import Path

import family_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from test_llama import assert_near, batch_of, joined, scores

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models import attention, families, hf, loading, moe
from jaxpost.models.transformer import Transformer, unstack
from jaxpost.objectives import sft
from jaxpost.sampling.decode import complete

GOLDEN = Path(__file__).parent / "golden" / "families.npz"
QUICK = {"mistral/yarn", "qwen2/slides_late", "qwen3/bias", "qwen3_moe/normalised", "mixtral/window", "olmo2/bias",
         "olmoe/clipped", "phi3/long", "smollm3/window", "gemma/untied", "gemma2/caps", "gemma3_text/pattern"}  # fmt: skip
each_case = pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in cases.NAMES])


@pytest.fixture(scope="session")
def golden():
    with np.load(GOLDEN) as found:
        return dict(found)


def opened(folder, name):
    """(Transformer, parameters) of a case, written to a folder and read from there on one device."""
    cases.write(folder, name)
    return loading.open_model(str(folder), sharding.make_mesh(devices=jax.devices()[:1]))


def test_every_family_has_its_cases_and_a_quick_one():
    assert set(cases.CASES) | {"llama"} == set(families.FAMILIES)
    assert {name.split("/")[0] for name in QUICK} == set(cases.CASES) and all(len(c) >= 5 for c in cases.CASES.values())


@each_case
def test_logits_and_greedy_tokens_equal_those_of_transformers(name, golden, tmp_path):
    found, params = opened(tmp_path, name)
    rows = cases.tokens(name)
    # Seen: 2e-6 of the largest at most, float32 rounding; the project's promise is 1e-4.
    got = scores(found.transformer, params, batch_of(rows, cases.LENGTHS[0]))
    assert_near(joined(got, rows), golden[f"{name}/logits"], 1e-5)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    prompt = [rows[0][: cases.PROMPT]]
    made = complete(
        found.transformer, params, prompt, mesh=mesh, prompt_window=cases.PROMPT, new=cases.NEW, stop=[], temperature=0.0
    )
    np.testing.assert_array_equal(made.tokens[0], golden[f"{name}/greedy"])


@each_case
def test_a_folder_that_was_read_is_written_bit_for_bit(name, tmp_path):
    found, params = opened(tmp_path / "a", name)
    hf.save(tmp_path / "b", params, found.transformer.arch, found.config)
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in "ab")
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        np.testing.assert_array_equal(second[key], tensor, err_msg=key)
    assert found.transformer.arch.parameters() == sum(x.size for x in jax.tree.leaves(params))
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {k: written[k] for k in hf.portable(found.config)} == hf.portable(found.config)
    assert families.architecture(written) == found.transformer.arch


@pytest.mark.parametrize("name", ["qwen3_moe/plain", "mixtral/window", "olmoe/bias"])
def test_experts_that_a_file_has_as_one_tensor_are_read(name, tmp_path):
    """transformers 5 writes a layer's experts as one tensor if asked to; make_families.py compares these names with its own."""
    found, params = opened(tmp_path / "hub", name)
    cases.write(tmp_path / "stacked", name)
    held, file = cases.stacked(name), tmp_path / "stacked" / "model.safetensors"
    save_file(held, file)
    _, again = loading.open_model(str(tmp_path / "stacked"), sharding.make_mesh(devices=jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # Columns and rows alone, as a mesh asks for them.
    first = hf.check(tmp_path / "stacked", found.transformer.arch)
    for tensor, values in cases.weights(name).items():
        if values.ndim == 2:
            np.testing.assert_array_equal(first[tensor][1:3, 2:5], values[1:3, 2:5], err_msg=tensor)
    stack = "model.layers.0.mlp.experts.down_proj"
    save_file(held | {stack: held[stack][1:]}, file)
    with pytest.raises(UserError, match="tensors are missing, first model.layers.0"):
        hf.check(tmp_path / "stacked", found.transformer.arch)


def test_every_field_of_every_family_is_honoured_harmless_or_refused():
    """Each field of a case set to something else: the architecture changes, or the config is refused by name."""
    for family in cases.CASES:
        for case in cases.CASES[family]:
            fields = cases.config(f"{family}/{case}")
            arch = families.architecture(fields)
            for key, value in fields.items():
                if key in families.HARMLESS:
                    continue
                other = _another(value)
                try:
                    changed = families.architecture({**fields, key: other})
                except UserError as error:
                    assert re.search(RELATED.get(key, key), str(error)), f"{family}/{case} {key}: {error}"
                    continue
                assert _idle(family, key, fields) == (changed == arch), f"{family}/{case}: {key} is read and ignored"
        with pytest.raises(UserError, match=f"the {family} family does not understand: surprise.* delete them from the file"):
            families.architecture({**fields, "surprise": 1})
        assert families.architecture({**fields, "surprise": None}) == families.architecture(fields), "null is: not set"


# A field that is refused by what follows from it.
RELATED = {
    "num_attention_heads": "head_dim|short_factor",
    "hidden_size": "head_dim|short_factor",
    "num_hidden_layers": "layers",
    "rope_scaling": "rope",
    "rope_parameters": "rope",
    "use_sliding_window": "layer_types",
    "partial_rotary_factor": "head_dim",
    "num_experts": "num_experts_per_tok",
}


def _idle(family: str, key: str, fields: dict) -> bool:
    """Whether a field means nothing beside the others; `transformers` does not read it either."""
    windows = family in ("qwen2", "qwen3", "qwen3_moe") and not fields.get("use_sliding_window")
    return (
        (windows and key in ("sliding_window", "max_window_layers"))
        or (key == "max_window_layers" and "layer_types" in fields)
        or (key == "intermediate_size" and family == "qwen3_moe")
    )


def _another(value):
    """A value of the same kind that differs, and is possible where that is easy to say."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2
    if isinstance(value, float):
        return value * 1.5
    if isinstance(value, str):
        return {"gelu": "relu"}.get(value, "gelu")
    if isinstance(value, list):
        return value[::-1] if value != value[::-1] else [{"0": 1, "1": 0}.get(str(v), v) for v in value]
    if isinstance(value, dict):
        return (
            {**value, "rope_theta": 12.0}
            if "sliding_attention" not in value
            else {**value, "full_attention": {"rope_theta": 3.0}}
        )
    return 3


def test_what_transformers_writes_for_each_family_is_understood():
    """Walks the config that this `transformers` makes by default, so a field that a later one adds is noticed here first."""
    for family in cases.CASES:
        fields = transformers.AutoConfig.for_model(family).to_dict()
        arch = families.architecture({k: v for k, v in fields.items() if k not in ("head_dim",) or v})
        sparse = families.architecture({"model_type": family, **{k: fields[k] for k in SIZES if k in fields}})
        # The defaults of absent fields are transformers' own.
        assert dataclasses.replace(sparse, init_std=arch.init_std) == arch, family


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_both_spellings_of_the_number_of_experts_are_read(family):
    """transformers 5 writes another one for Qwen3-MoE than the files on the hub have."""
    fields = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"model_type": family, "num_key_value_heads": 1, "num_experts_per_tok": 2}
    written = json.loads(transformers.AutoConfig.for_model(**fields, num_experts=4).to_json_string())
    assert families.architecture(written).experts == 4
    hub, other = (families.architecture({**fields, k: 4}) for k in ("num_experts", "num_local_experts"))
    assert hub == other and hub.experts == 4
    with pytest.raises(UserError, match="num_local_experts = 4, but num_experts = 8; keep one"):
        families.architecture({**fields, "num_experts": 8, "num_local_experts": 4})


def test_fields_that_cannot_be_honoured_are_refused_by_name():
    wrong = {
        "gemma2": {"use_bidirectional_attention": True},
        "mixtral": {"router_jitter_noise": 0.1},
        "phi3": {"resid_pdrop": 0.1},
        "qwen3_moe": {"mlp_only_layers": [1]},
        "olmo2": {"clip_qkv": 3.0},
        "qwen2": {"layer_types": ["sliding_attention", "full_attention"]},
        "smollm3": {"no_rope_layers": [1]},
    }
    for family, changes in wrong.items():
        fields = {**cases.config(f"{family}/{next(iter(cases.CASES[family]))}"), **changes}
        with pytest.raises(UserError, match=next(iter(changes))):
            families.architecture(fields)


def test_the_language_part_of_a_model_that_sees_opens(tmp_path):
    name = "gemma3_text/plain"
    cases.write(tmp_path, name)
    held = load_file(tmp_path / "model.safetensors")
    moved = {f"language_model.{k}": v for k, v in held.items()} | {"vision_tower.vision_model.w": np.ones(3, np.float32)}
    save_file(moved, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": cases.config(name), "vision_config": {}})
    )
    spec, params = loading.open_model(str(tmp_path), sharding.make_mesh(devices=jax.devices()[:1]))
    assert spec.transformer.arch == families.architecture(cases.config(name))
    np.testing.assert_array_equal(params["embed"]["weight"], held["model.embed_tokens.weight"])


def test_scanned_and_unrolled_layers_of_several_kinds_agree(tmp_path):
    found, params = opened(tmp_path, "gemma3_text/pattern")
    batch = batch_of(cases.tokens("gemma3_text/pattern"), 24)
    scanned = scores(found.transformer, params, batch)
    unrolled = scores(found.transformer, unstack(params, found.transformer.arch.layers), batch)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5)  # float32 rounding of two programs


# ------------------------------------------------------------------------------------------------- Mixtures of experts


def _dense_mix(x, experts, weights, gate, up, down):
    """Every expert on every token, then the chosen ones: the same sum without sorting."""
    every = jnp.einsum(
        "bsef,efd->bsed", jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, gate)) * jnp.einsum("bsd,edf->bsef", x, up), down
    )
    picked = jnp.take_along_axis(every, experts[..., None], axis=2)
    return jnp.sum(picked * weights[..., None], axis=2)


def _mix_inputs():
    keys = jax.random.split(jax.random.PRNGKey(0), 6)
    x = jax.random.normal(keys[0], (8, 6, 5))
    _, experts, weights = moe.route(jax.random.normal(keys[1], (8, 6, 4)), 2, True)
    gate, up = (jax.random.normal(k, (4, 5, 8)) for k in keys[2:4])
    return x, experts, weights, gate, up, jax.random.normal(keys[4], (4, 8, 5))


def test_sorted_experts_equal_dense_ones_in_value_and_gradient():
    x, experts, weights, *kernels = _mix_inputs()

    def total(mix):
        return lambda x, weights, kernels: jnp.sum(jnp.sin(mix(x, experts, weights, *kernels)))

    ours = jax.value_and_grad(total(lambda *a: moe.mix(*a, jax.nn.silu)), argnums=(0, 1, 2))(x, weights, kernels)
    theirs = jax.value_and_grad(total(_dense_mix), argnums=(0, 1, 2))(x, weights, kernels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_experts_on_a_mesh_equal_those_on_one_device():
    x, experts, weights, *kernels = _mix_inputs()

    def total(x, weights, kernels):
        out = sharding.by_rows(lambda *a: moe.mix(*a, jax.nn.silu), (x, experts, weights), kernels, ("EDF", "EDF", "EFD"))
        return jnp.sum(jnp.sin(out))

    alone = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(x, weights, kernels)
    with sharding.use(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        spread = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(x, weights, kernels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), spread, alone)


@pytest.mark.slow
def test_a_mixture_trains_alike_on_a_mesh(tmp_path):
    found, params = opened(tmp_path, "qwen3_moe/normalised")
    batch = batch_of([cases.tokens("qwen3_moe/normalised")[0]] * 8, 24) | {"mask": np.arange(24)[None].repeat(8, 0) > 0}

    def loss(params, batch):
        term = sft.nll(found.transformer.forward, params, batch, None)[0]["nll"]
        return term.sum / term.weight

    alone = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with sharding.use(mesh):
        placed = jax.device_put(jax.device_get(params), sharding.stored(mesh, params))
        spread = jax.jit(jax.value_and_grad(loss))(placed, sharding.distribute(batch, mesh, 8))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(spread), strict=True):
        assert float(jnp.max(jnp.abs(a - jax.device_get(b)))) <= 1e-5 * max(1.0, float(jnp.max(jnp.abs(a)))), path


def test_yarn_and_longrope_have_their_ramp_and_their_two_lengths():
    yarn = families.architecture(cases.config("qwen2/yarn_ramp")).kinds[0].rope
    ratio = attention.frequencies(yarn, 6) / attention.frequencies(dataclasses.replace(yarn, kind="default"), 6)
    assert ratio[0] > 0.99 and ratio[-1] < 0.5 and all(np.diff(ratio) <= 0)
    long = families.architecture(cases.config("phi3/long")).kinds[0].rope
    within, beyond = attention.frequencies(long, 6, 4), attention.frequencies(long, 6, 5)
    np.testing.assert_allclose(within / beyond, np.array(long.long) / np.array(long.short), rtol=1e-6)


@pytest.mark.slow
def test_longrope_goes_by_the_document_and_not_by_the_row():
    arch = families.architecture(cases.config("phi3/short"))
    model = Transformer(
        dataclasses.replace(arch, kinds=(families.Kind(None, dataclasses.replace(arch.kinds[0].rope, original=8)),))
    )
    params = model.init(jax.random.PRNGKey(0))
    short, long = np.arange(6) % 37, np.arange(12) % 37
    alone = {n: scores(model, params, batch_of([row], len(row))) for n, row in (("short", short), ("long", long))}
    packed = batch_of([np.concatenate([short, long])], 24)
    packed["segments"][0, 6:18], packed["positions"][0, 6:18] = 2, np.arange(12)
    found = scores(model, params, packed)
    np.testing.assert_allclose(found[0, :6], alone["short"][0], atol=1e-5)
    np.testing.assert_allclose(found[0, 6:18], alone["long"][0], atol=1e-5)
    np.testing.assert_array_equal(attention.document_lengths(packed["segments"], packed["positions"])[0, [0, 6]], [6, 12])


def test_fields_of_released_files_that_change_nothing_are_taken():
    extra = {
        "smollm3": {"pretraining_tp": 2, "max_window_layers": 28},
        "phi3": {
            "attention_bias": False,
            "mlp_bias": False,
            "lm_head_bias": False,
            "full_attn_mod": 1,
            "interpolate_factor": 1,
        },
    }
    for family, fields in extra.items():
        plain = cases.config(f"{family}/{next(iter(cases.CASES[family]))}")
        assert families.architecture(plain | fields) == families.architecture(plain)
    with pytest.raises(UserError, match="lm_head_bias = True is not supported"):
        families.architecture(plain | {"lm_head_bias": True})


def test_router_sums_count_real_tokens_alone(tmp_path):
    found, params = opened(tmp_path, "mixtral/window")
    batch = batch_of(cases.tokens("mixtral/window"), 24)
    router = jax.jit(found.transformer.forward)(params, batch).router
    arch = found.transformer.arch
    assert router["probs"].shape == (2, arch.layers, arch.experts)
    np.testing.assert_allclose(router["probs"].sum(-1), [[24] * arch.layers, [9] * arch.layers], rtol=1e-5)
    np.testing.assert_array_equal(router["picks"].sum(-1), [[24 * arch.chosen] * arch.layers, [9 * arch.chosen] * arch.layers])


def test_a_transformer_without_experts_says_nothing_of_a_router():
    arch = families.architecture(cases.config("olmo2/plain"))
    out = jax.eval_shape(
        lambda: Transformer(arch).forward(Transformer(arch).init(jax.random.PRNGKey(0)), batch_of([np.arange(4)], 4))
    )
    assert out.router is None


def test_a_switch_of_released_files_that_is_off_is_taken_and_on_is_refused():
    """The distilled Qwen 2.5 models of DeepSeek-R1 say use_mrope: false, which transformers does not read."""
    fields = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"model_type": "qwen2", "num_key_value_heads": 1}
    assert families.architecture({**fields, "use_mrope": False}) == families.architecture(fields)
    with pytest.raises(UserError, match="use_mrope = True is not supported"):
        families.architecture({**fields, "use_mrope": True})


def test_eos_ids_beside_the_language_part_of_a_model_that_sees_are_kept():
    whole = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {"hidden_size": 8}}
    assert families.language_part(whole) == {"eos_token_id": [1, 106], "hidden_size": 8, "model_type": "gemma3_text"}
    whole["text_config"]["eos_token_id"] = 1  # the part's own counts
    assert families.language_part(whole)["eos_token_id"] == 1


# ---------------------------------------------------------------------------------------------------- Released models

RELEASED = json.loads((Path(__file__).parent / "released_configs.json").read_text())
REFUSED = {
    "Qwen/Qwen3-8B-FP8": "quantization_config = .* is not supported",
    "Qwen/Qwen1.5-MoE-A2.7B": "model_type 'qwen2_moe' is not supported",
    "allenai/OLMo-1B-hf": "model_type 'olmo' is not supported",
    "microsoft/Phi-3.5-MoE-instruct": "model_type 'phimoe' is not supported",
}
# How many parameters the hub counts in their files.
COUNTED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "allenai/OLMoE-1B-7B-0924-Instruct": 6_919_161_856,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-3-1b-it": 999_885_952,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "microsoft/phi-4": 14_659_507_200,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
}


def test_released_models_are_described_or_refused_for_a_stated_reason():
    """config.json as the makers publish it, of the models that are used most; what is refused is refused by its reason."""
    assert len(RELEASED) >= 50 and {c["model_type"] for c in RELEASED.values()} >= set(families.FAMILIES) - {"gemma3_text"}
    for name, config in RELEASED.items():
        if name in REFUSED:
            with pytest.raises(UserError, match=f"{name}: {REFUSED[name]}"):
                families.architecture(config, name)
            continue
        arch = families.architecture(families.language_part(config), name)
        assert arch.parameters() == COUNTED.get(name, arch.parameters()), name


def test_fields_that_transformers_never_reads_change_nothing():
    unread = {
        "Qwen/Qwen2.5-7B-Instruct-1M": ["dual_chunk_attention_config"],
        "Qwen/Qwen3-Coder-30B-A3B-Instruct": ["qkv_bias", "use_qk_norm", "shared_expert_intermediate_size"],
        "google/gemma-2-9b-it": ["sliding_window_size"],
    }
    for name, keys in unread.items():
        rest = {k: v for k, v in RELEASED[name].items() if k not in keys}
        assert len(rest) == len(RELEASED[name]) - len(keys)
        assert families.architecture(rest) == families.architecture(RELEASED[name])
    config = RELEASED["deepseek-ai/DeepSeek-R1-0528-Qwen3-8B"]
    scaling = {k: v for k, v in config["rope_scaling"].items() if k != "attn_factor"}
    assert len(scaling) == 3 and families.architecture({**config, "rope_scaling": scaling}) == families.architecture(config)
