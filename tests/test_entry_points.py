"""generate and export as a user meets them: commands, help, one message where something is wrong, folders that open elsewhere.

A subprocess costs seconds, so an entry point runs in one where the command line is what is tested; the rest calls functions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest
import toy_tokenizers
import transformers
from tokenizers import decoders

from jaxpost import api, export, sharding, tokenizer
from jaxpost.config import startup
from jaxpost.data import chat, templates
from jaxpost.errors import UserError
from jaxpost.models import families, hf, loading
from jaxpost.models.heads import logits
from jaxpost.models.transformer import Transformer
from jaxpost.sampling import text as text_module
from jaxpost.sampling.decode import Completions, Finished, together
from jaxpost.storage import checkpoint
from jaxpost.types import TrainState

MODEL = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,  # so that greedy text is not one token over and over
}


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What a run with two stages leaves behind: seed 1's weights at step 3 of `first`, 3's at step 5 of `last`, 2's at 10."""
    folder = tmp_path_factory.mktemp("run")
    spec = loading.describe(MODEL, "tasks.arithmetic.tokenizer")
    loading.keep_description(spec, folder, templates.jinja(spec.tokenizer))
    (folder / "config.json").write_text(json.dumps({"stages": ["first", "last"]}))
    for stage, step, seed in (("first", 3, 1), ("last", 5, 3), ("last", 10, 2)):
        saved = checkpoint.Checkpoints(folder / "checkpoints" / stage)
        params = loading.weights(spec, one_device(), seed)
        count = jnp.asarray(step)
        frozen = jax.tree.map(lambda _: None, params)
        rest = {"opt_state": (), "ema": None, "key": jax.random.PRNGKey(0), "skipped": count, "streak": count}
        saved.save(TrainState(step=count, train=params, frozen=frozen, **rest), {})
        saved.close()
    return folder


def command(*arguments):
    """(exit status, stdout, stderr) of python -m jaxpost.<arguments>, on one device."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def parameters(where):
    return loading.open_model(str(where), one_device())


# ------------------------------------------------------------------------------------------------------- Command lines


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (
            "generate",
            ["Completes prompts", "--prompt=", "--model: ", "--new: ", "--temperature: ", "--[no]chat: ", "--[no]json: "],
        ),
        (
            "export",
            ["Hugging Face folder", "--checkpoint=/tmp", "--checkpoint: ", "--out: ", "--dtype: <bfloat16|float16|float32>"],
        ),
        ("merge", ["Merges the weights", "--with: ", "--of: ", "--base: ", "--out: ", "--dtype: <bfloat16|float16|float32>"]),
    ],
)
def test_help_says_what_it_does_with_an_example_and_every_flag(module, wanted):
    _, out, _ = command(f"jaxpost.{module}", "--help")
    assert [w for w in [*wanted, f"    python -m jaxpost.{module} --"] if w not in out] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jaxpost.generate", "--prompt=1+2"], "--model=... is required: Folder of the model"),
        (["jaxpost.generate", "--model=/nowhere/at/all", "--prompt=1+2"], "/nowhere/at/all: no such folder"),
        (["jaxpost.export", "--checkpoint=/nowhere/at/all"], "--out=... is required: The folder to write"),
        (["jaxpost.export", "--checkpoint=a", "--out=b", "--dtype=int8"], "--dtype=int8: value should be one of"),
    ],
)
def test_a_wrong_command_line_ends_with_one_message(arguments, message):
    status, out, error = command(*arguments)
    assert status == 2 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_generate_from_a_workdir_prints_one_object_a_completion(workdir):
    arguments = ["--chat", "--prompt=12+34", "--prompt=7x8", "--n=2", "--temperature=1", "--new=5", "--seed=3", "--json"]
    status, out, error = command("jaxpost.generate", f"--model={workdir}", *arguments)
    assert (status, error) == (0, "")
    model = api.load(workdir, mesh=one_device())
    texts = model.generate(["12+34", "7x8"], new=5, temperature=1.0, chat=True, seed=3, n=2)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["prompt"] for r in rows] == ["12+34", "12+34", "7x8", "7x8"]
    assert [r["completion"] for r in rows] == texts
    assert len(set(texts)) > 1


def test_export_of_a_stage_opens_with_transformers(workdir, tmp_path):
    out = tmp_path / "out"
    status, printed, error = command("jaxpost.export", f"--checkpoint={workdir / 'checkpoints' / 'first'}", f"--out={out}")
    assert (status, error) == (0, "")
    assert printed.startswith(f"{out}: ") and "model.safetensors" in printed and "tokenizer.json" in printed
    found, params = parameters(out)
    first = loading.weights(loading.describe(MODEL), one_device(), 1)
    jax.tree.map(np.testing.assert_array_equal, params, first)
    assert {k: found.config[k] for k in MODEL} == MODEL
    # The stop token is where transformers and servers look for it: both files; 3 is the arithmetic tokenizer's <|end|>.
    assert found.config["eos_token_id"] == 3
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 3, "pad_token_id": 0}

    theirs = transformers.AutoTokenizer.from_pretrained(out)
    conversation = [{"role": "user", "content": "12+34"}]
    prompt = chat.encode_prompt(conversation, tokenizer.load(workdir / "model"))
    opened = theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    np.testing.assert_array_equal(opened, prompt)


def test_an_exported_model_has_the_same_logits_in_torch(workdir, tmp_path):
    torch = pytest.importorskip("torch")
    for folder, dtype, tolerance in (("wide", None, 1e-4), ("narrow", "bfloat16", 1e-4)):
        export.export(str(workdir), str(tmp_path / folder), mesh=one_device(), dtype=dtype)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        found, params = parameters(tmp_path / folder)
        tokens = np.arange(20, dtype=np.int32)[None]
        out = found.transformer.forward(params, {"tokens": tokens, "positions": tokens, "segments": np.ones_like(tokens)})
        with torch.no_grad():
            wanted = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        # The bfloat16 folder is read by both in float32, so both weights are the same; seen 2e-6 of the largest.
        np.testing.assert_allclose(logits(out.hidden, out.head), wanted, atol=tolerance * np.abs(wanted).max())


# -------------------------------------------------------------------------------------------------------- The functions


def test_a_workdir_a_stage_and_a_step_are_found(workdir):
    described = loading.describe(MODEL)
    for where, seed in ((".", 2), ("checkpoints/last", 2), ("checkpoints/last/5", 3), ("checkpoints/first", 1)):
        _, params = parameters(workdir / where)
        jax.tree.map(np.testing.assert_array_equal, params, loading.weights(described, one_device(), seed))


def test_the_template_of_the_run_travels_with_the_workdir(tmp_path):
    """A recipe's template may not be the tokenizer's; whoever opens the workdir must get the one that was trained with."""
    text = toy_tokenizers.byte_pairs()
    tokenizer.save(text, tmp_path / "tokenizer")
    spec = loading.describe({**MODEL, "vocab_size": 300}, str(tmp_path / "tokenizer"))
    loading.keep_description(spec, tmp_path, templates.jinja(spec.tokenizer, "chatml"))
    assert tokenizer.load(tmp_path / "model").chat_template == templates.TEMPLATES["chatml"]
    assert spec.tokenizer.chat_template is None


def test_export_of_a_template_with_its_own_stop_token_names_both(tmp_path):
    spec = loading.describe({**MODEL, "vocab_size": 300})
    folder = tmp_path / "in"
    hf.save(folder, loading.weights(spec, one_device()), spec.transformer.arch, {**MODEL, "vocab_size": 300, "eos_token_id": 7})
    tokenizer.save(toy_tokenizers.byte_pairs(templates.TEMPLATES["chatml"]), folder)
    export.export(str(folder), str(tmp_path / "out"), mesh=one_device())
    text = tokenizer.load(folder)
    ends = [text.eos_token_id, 7, text.convert_tokens_to_ids("<|im_end|>")]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == ends
    assert hf.read_config(tmp_path / "out")["eos_token_id"] == 7  # what the folder came with stays


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_every_eos_id_of_a_folder_ends_completions_and_survives_run_and_export(tmp_path, file):
    """generation_config.json's ids are the ones that count; config.json's are where there is no such file."""
    fields, text = {**MODEL, "vocab_size": 300}, toy_tokenizers.byte_pairs()
    found, folder = loading.describe(fields), tmp_path / "in"
    own = {"eos_token_id": [7, 9]} if file == "config.json" else {"eos_token_id": 5}
    hf.save(folder, loading.weights(found, one_device()), found.transformer.arch, {**fields, **own})
    tokenizer.save(text, folder)
    written = {"eos_token_id": [7, 9], "top_k": 20}
    if file == "generation_config.json":
        (folder / file).write_text(json.dumps(written))
    ends = (text.eos_token_id, 7, 9)
    assert chat.stop_ids(text, "plain", loading.describe(str(folder)).ends) == ends
    assert api.load(folder, mesh=one_device()).ends == (7, 9)
    tokenizer.save(text, tmp_path / "other")
    assert loading.describe(str(folder), str(tmp_path / "other")).ends == ()  # ids of a vocabulary that is not used

    export.export(str(folder), str(tmp_path / "out"), mesh=one_device())
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert tuple(kept["eos_token_id"]) == ends
    assert kept.get("top_k") == (20 if file == "generation_config.json" else None)
    loading.keep_description(loading.describe(str(folder)), tmp_path, templates.jinja(text, "plain"))
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [7, 9]


def test_the_token_that_ends_a_completion_is_shown_where_it_is_a_word(monkeypatch):
    """As transformers' decode without special tokens does."""
    words = toy_tokenizers.byte_pairs(templates.TEMPLATES["chatml"])
    end = words.convert_tokens_to_ids("<|im_end|>")
    ended = [Finished(i, np.array(ids, np.int32), np.zeros(2), True, 1) for i, ids in enumerate([[5, end], [5, 7]])]
    monkeypatch.setattr(text_module, "complete", lambda *_, **__: together(ended, 3))
    model = loading.describe({**MODEL, "vocab_size": 300}).transformer
    rows = text_module.completed(model, {}, words, [np.array([4])], mesh=None, n=2, ends=(7,))
    assert [ids.tolist() for _, ids in rows] == [[5], [5, 7]]


def test_eos_ids_that_the_model_has_no_row_for_are_left_out_and_other_values_named():
    assert loading.describe({**MODEL, "eos_token_id": [32, 3, -1]}).ends == (3,)
    for wrong in ("3", [True], [[3]]):
        with pytest.raises(UserError, match="config.model: eos_token_id has .* not a whole number; give an id, or a list"):
            loading.describe({**MODEL, "eos_token_id": wrong})


def test_export_overwrites_nothing(workdir, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty \(it holds mine\.txt\)"):
        export.export(str(workdir), str(tmp_path), mesh=one_device())
    with pytest.raises(UserError, match="is a file"):
        export.export(str(workdir), str(tmp_path / "mine.txt"), mesh=one_device())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_without_a_checkpoint_yet_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"stages": []}))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint there yet"):
        export.export(str(tmp_path), str(tmp_path / "out"), mesh=one_device())
    assert not (tmp_path / "out").exists()


def asked_of_the_sampler(monkeypatch, text, prompts, positions=64, answer=" cab", **options):
    """(what is asked of the sampler, the texts made of a stub's answer and its stop token)."""
    asked = {}

    def complete(model, params, prompts, **options):
        asked.update(options, prompts=[p.tolist() for p in prompts])
        ids = [*tokenizer.encode(text, answer), options["stop"][0]]
        count = len(prompts) * options["group"]
        tokens, lengths = np.tile(np.array([*ids, 0, 0, 0], np.int32), (count, 1)), np.full(count, len(ids))
        return Completions(tokens, lengths, np.zeros(tokens.shape), np.ones(count, bool), lengths - 1)

    monkeypatch.setattr(text_module, "complete", complete)
    model = Transformer(families.architecture({**MODEL, "vocab_size": 300, "max_position_embeddings": positions}))
    pairs = text_module.completed(model, None, text, prompts, mesh=None, **options)
    return asked, [text_module.continuation(text, *pair) for pair in pairs]


def test_a_raw_prompt_gets_the_opening_token_once(monkeypatch):
    """0 is <s>; "a" is 68. A text that spells the token out has it already, and a tokenizer that adds none gets none."""
    adds, plain = toy_tokenizers.characters(), toy_tokenizers.characters(adds_bos=False)
    for text, prompt, wanted in (
        (adds, "ab", [0, 68, 69]),
        (adds, "<s>ab", [0, 68, 69]),
        (adds, "", [0]),
        (plain, "ab", [68, 69]),
        (toy_tokenizers.characters(bos_token="<unk>"), "ab", [68, 69]),  # what it adds is no beginning of a text
    ):
        asked, _ = asked_of_the_sampler(monkeypatch, text, [prompt])
        assert asked["prompts"] == [wanted]
        assert asked["stop"] == (1,)
    with pytest.raises(UserError, match="the prompt is empty"):
        asked_of_the_sampler(monkeypatch, plain, [""])
    with pytest.raises(UserError, match="at least one prompt"):
        asked_of_the_sampler(monkeypatch, plain, [])


def test_a_chat_prompt_is_rendered_and_stops_at_the_end_of_the_turn(monkeypatch):
    text = toy_tokenizers.byte_pairs()
    asked, texts = asked_of_the_sampler(monkeypatch, text, ["hi"], chat=True, template="chatml")
    assert text.decode(asked["prompts"][0]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert asked["stop"] == (text.eos_token_id, text.convert_tokens_to_ids("<|im_end|>"))
    assert texts == [" cab"]
    assert (asked["temperature"], asked["seed"]) == (0.0, 0)
    asked, _ = asked_of_the_sampler(monkeypatch, text, ["hi"], temperature=0.5, seed=9)
    assert (asked["temperature"], asked["seed"]) == (0.5, 9)


def test_the_completion_keeps_its_leading_space_and_hides_the_stop_token(monkeypatch):
    """Once by bytes, once where a decoder strips the space of a text's first word, as Llama's does."""
    stripping = toy_tokenizers.byte_pairs()
    stripping.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    for text in (toy_tokenizers.byte_pairs(), stripping):
        _, texts = asked_of_the_sampler(monkeypatch, text, ["ab", "b c"], n=2)
        assert texts == [" cab"] * 4
    assert stripping.decode(tokenizer.encode(stripping, " cab")) == "cab"


def test_room_for_prompt_and_completion(monkeypatch):
    text = toy_tokenizers.characters(adds_bos=False)
    asked, _ = asked_of_the_sampler(monkeypatch, text, ["ab", "abc"], positions=1000)
    assert (asked["new"], asked["prompt_window"]) == (200, 32)
    asked, _ = asked_of_the_sampler(monkeypatch, text, ["ab", "abc"])
    assert (asked["new"], asked["prompt_window"]) == (61, 3)
    asked, _ = asked_of_the_sampler(monkeypatch, text, ["a" * 33], positions=100, new=20)
    assert (asked["new"], asked["prompt_window"]) == (20, 64)
    asked, _ = asked_of_the_sampler(monkeypatch, text, ["a" * 60], new=4)
    assert (asked["new"], asked["prompt_window"]) == (4, 60)
    with pytest.raises(
        UserError, match="60 tokens and 5 new ones do not fit the model's 64 positions .*; set new to 4 or less"
    ):
        asked_of_the_sampler(monkeypatch, text, ["a", "a" * 60], new=5)
    with pytest.raises(UserError, match="64 tokens and 1 new ones do not fit .*; shorten the prompt"):
        asked_of_the_sampler(monkeypatch, text, ["a" * 64])


def test_a_character_without_a_token_is_named(monkeypatch):
    text = tokenizer.characters("0123456789+")
    for chat_mode in (False, True):
        with pytest.raises(UserError, match="the tokenizer has no token for 'x'; "):
            asked_of_the_sampler(monkeypatch, text, ["1+2x"], chat=chat_mode)


def test_a_model_without_a_tokenizer_cannot_generate(tmp_path):
    llama_cases.write(tmp_path, "tied")
    status, _, error = command("jaxpost.generate", f"--model={tmp_path}", "--prompt=a")
    assert status == 2
    assert (
        error
        == "error: the model's folder has no tokenizer (tokenizer.json), so there is no way from text to tokens; give it one.\n"
    )


LAYOUT = """
import sys
from setuptools.command.editable_wheel import editable_wheel
from setuptools.dist import Distribution
made = []
Distribution.run_commands = lambda self: made.append(self)
sys.argv = ["setup.py", "editable_wheel"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
command = editable_wheel(made[0])
made[0].parse_config_files()
for name, (_, value) in made[0].get_option_dict("editable_wheel").items():
    setattr(command, name, value)
command.finalize_options()
print(*[folder.resolve() for folder in command._select_strategy("jaxpost", "tag", "build").path_entries])
"""


def test_an_editable_install_puts_the_clone_on_the_path():
    # A script beside the clone finds the clone's folder first, as an empty package: an import hook would come too late for it.
    pytest.importorskip("setuptools")
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", LAYOUT], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(root)], done.stderr


# ------------------------------------------------------------------------------------------------------ Starting devices


def _noisy_devices():
    os.write(2, b"Failed to find host bounds for accelerator type\n")  # as libtpu's C++ does
    return ["cpu"]


@pytest.mark.parametrize(("accelerators", "noise"), [((), ""), (("/dev/accel*",), "Failed to find host bounds")])
def test_libtpu_is_heard_only_where_there_is_an_accelerator(monkeypatch, capfd, accelerators, noise):
    """Every command starts its devices by this one function; with an accelerator, jax starts them at their first use."""
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(startup.glob, "glob", lambda pattern: [pattern] if pattern in accelerators else [])
    started = []
    monkeypatch.setattr(startup.jax, "devices", lambda: started or started.extend(_noisy_devices()) or started)
    startup.start()
    startup.jax.devices()
    assert noise in (written := capfd.readouterr().err) and bool(noise) == bool(written)


def test_why_a_device_did_not_start_is_shown(monkeypatch, capfd):
    def fails():
        _noisy_devices()
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(startup.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(startup.jax, "devices", fails)
    with pytest.raises(RuntimeError, match="Unable to initialize"):
        startup.start()
    assert "Failed to find host bounds" in capfd.readouterr().err
