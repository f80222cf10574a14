"""Models by name: a hub on loopback serves a checkpoint, once; the cache serves it from then on, without a network."""

import hashlib
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax.numpy as jnp
import llama_cases
import pytest

from jaxpost.errors import UserError
from jaxpost.models import computing, hub
from jaxpost.storage import network

ROOT = Path(__file__).parent.parent
SHARDS = [f"shard-0000{i}-of-00002.safetensors" for i in (1, 2)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as downloading a snapshot needs."""

    folder: Path
    asked: list[tuple[str, str]] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve(body=True)

    def do_HEAD(self):
        self._serve(body=False)

    def _serve(self, body: bool):
        self.asked.append((self.path, self.headers.get("authorization", "")))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if name != "org/tiny":
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
            if revision not in ("main", "v1", COMMIT):
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
            paths = list(self.folder.iterdir())
            if parts[4:5] == ["tree"]:
                files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in paths]
                return self._send(200, json.dumps(files).encode(), {}, body)
            files = [{"rfilename": p.name} for p in paths]
            return self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode(), {}, body)
        if parts[:2] != ["org", "tiny"] or not (self.folder / parts[-1]).exists():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        content = (self.folder / parts[-1]).read_bytes()
        tag = hashlib.sha256(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}, body)

    def _send(self, status: int, content: bytes, headers: dict, body: bool):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, what was asked) of a hub that has org/tiny: a Llama in files that only its index knows, beside the same in one
    of their makers' own, a pickle and a program."""
    folder = tmp_path_factory.mktemp("hub")
    llama_cases.write(folder, "grouped", files=2)
    for file in folder.glob("model-*.safetensors"):
        file.rename(folder / file.name.replace("model", "shard"))
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-", "shard-"))
    (folder / "model-makers.safetensors").write_bytes(b"too much")
    (folder / "pytorch_model.bin").write_bytes(b"never")
    (folder / "modeling.py").write_text("raise SystemExit('never')")
    handler = type("Served", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()


SCRIPT = """
import sys
from jaxpost import sharding
from jaxpost.storage import network
from jaxpost.errors import UserError
from jaxpost.models import loading
try:
    found, params = loading.open_model(sys.argv[1], sharding.make_mesh())
except UserError as e:
    sys.exit(f"error: {e}")
print(found.folder.name, sorted(p.name for p in found.folder.iterdir()), float(abs(params["norm"]["scale"]).sum()))
"""


def opened(name, home, address, **more):
    """(status, stdout, stderr) of opening a model in a process of its own, since the hub's settings are read at import."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", **more}
    run = subprocess.run([sys.executable, "-c", SCRIPT, name], env=environment, capture_output=True, text=True, timeout=120)
    return run.returncode, run.stdout, run.stderr


def test_a_model_comes_by_name_once_and_then_from_the_cache(served, tmp_path):
    address, asked = served
    status, out, err = opened("org/tiny@v1", tmp_path, address, HF_TOKEN="hf_secret")
    assert status == 0, err
    scale = abs(llama_cases.weights("grouped")["model.norm.weight"]).sum()
    folder, rest = out.split(" ", 1)
    assert folder == COMMIT and rest.startswith(f"{['config.json', 'model.safetensors.index.json', *SHARDS]} ")
    assert float(rest.split()[-1]) == pytest.approx(float(scale), rel=1e-6)
    assert {a for path, a in asked if "org/tiny" in path} == {"Bearer hf_secret"} and "hf_secret" not in out + err
    assert not [path for path, _ in asked if path.endswith((".bin", ".py"))]
    asked.clear()
    status, out, err = opened("org/tiny@v1", tmp_path, address, HF_HUB_OFFLINE="1")
    assert status == 0 and out.startswith(COMMIT) and not asked, err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("org/none", "no such folder, and no such model on the hub"),
        ("org/tiny@v9", "no revision 'v9'"),
    ],
)
def test_what_the_hub_has_not_is_said(served, tmp_path, name, told):
    status, _, err = opened(name, tmp_path, served[0])
    assert status == 1 and err.startswith(f"error: {name}: ") and told in err and "Traceback" not in err


def free_port() -> int:
    """A port of this machine that takes no connection."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_connection_is_looked_for_where_the_download_would_go(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    refused = f"http://127.0.0.1:{free_port()}/x"
    assert network.fault(refused) == "127.0.0.1 cannot be reached (Connection refused)"
    assert network.fault("https://nowhere.invalid/x").startswith("nowhere.invalid cannot be reached (")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{listening.getsockname()[1]}")
        assert network.fault("https://nowhere.invalid/x") == ""  # which the proxy may know
        monkeypatch.setenv("no_proxy", "nowhere.invalid")
        assert network.fault("https://nowhere.invalid/x")


def test_without_a_connection_the_hub_is_offline_and_gives_what_its_cache_holds(monkeypatch, tmp_path):
    constants = importlib.import_module("huggingface_hub.constants")
    config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets.config", config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "fault", lambda url: f"no way to {url}")
    with network.hub() as reason:
        assert constants.HF_HUB_OFFLINE and config.HF_HUB_OFFLINE and reason == f"no way to {constants.ENDPOINT}"
    assert not constants.HF_HUB_OFFLINE and not config.HF_HUB_OFFLINE
    message = r"org/tiny: no such folder, and .* \(no way to http.*\); the cache .*: hf download org/tiny --local-dir=FOLDER"
    with pytest.raises(UserError, match=message):
        hub.fetch("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    assert hub.fetch("org/tiny") == snapshot


def test_tfds_gives_an_address_up_at_once_where_no_connection_can_be_had():
    downloader = pytest.importorskip("tensorflow_datasets.core.download.downloader")
    address = f"http://127.0.0.1:{free_port()}/train.jsonl"
    before = downloader.MAX_RETRIES
    with network.tfds(), pytest.raises(network.Unreachable, match="127.0.0.1 cannot be reached") as raised:
        assert downloader.MAX_RETRIES == network.RETRIES
        with downloader._open_url(address):
            pass
    assert raised.value.url == address and before == downloader.MAX_RETRIES


def test_names_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    names = ["Qwen/Qwen2.5-0.5B", "a/b@refs/pr/1", "other/none"]
    assert all(hub.is_name(n) for n in names)
    assert not any(
        hub.is_name(n)
        for n in ("org/here", "org/misspelt", "/a/b", "../a", "a/b/c", "tasks.arithmetic.tokenizer", "model", "a/b.py:f")
    )


def test_a_gpu_without_bfloat16_computes_in_float32_and_says_so(capsys):
    class Device:
        platform, device_kind, compute_capability = "gpu", "Tesla T4", "7.5"

    assert computing.number_format("bfloat16", Device) == jnp.float32
    assert "Tesla T4 has no bfloat16" in capsys.readouterr().err
    Device.compute_capability = "8.0"
    assert computing.number_format("bfloat16", Device) == jnp.bfloat16
    assert computing.number_format("float32", Device) == jnp.float32
    assert not capsys.readouterr().err


def test_the_kernel_of_attention_is_the_platforms():
    class Device:
        platform, device_kind = "tpu", "TPU v5p"

    assert [computing.kernel(asked, Device) for asked in ("auto", "xla", "splash")] == ["splash", "xla", "splash"]
    with pytest.raises(UserError, match="config.attention: 'cudnn' does not run on TPU v5p; leave it at auto, or take xla"):
        computing.kernel("cudnn", Device)
    with pytest.raises(UserError, match="config.attention: unknown 'spalsh'. Did you mean 'splash'"):
        computing.kernel("spalsh", Device)
    Device.platform = "cpu"
    assert computing.kernel("auto", Device) == "xla"
