"""Where the files come from: folders, and a model hub that answers, refuses or is unreachable."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save
from zoo import llama

from loftq_exp.config import ModelConfig
from loftq_exp.errors import UserError
from loftq_exp.source.locate import Source, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_donottellanyone"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    llama(num_hidden_layers=1).save_pretrained(folder)
    return folder


def found(path: str | Path, cache_dir: Path, **settings: Any) -> Source:
    return locate(ModelConfig(path=str(path), kind="causal", **settings), cache_dir)


def refused(path: str | Path, cache_dir: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        found(path, cache_dir, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    return message


def test_a_folder_is_taken_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    assert found(checkpoint, tmp_path) == Source(checkpoint, "tiny-llama", str(checkpoint), None)


@pytest.mark.parametrize("path", ["tiny-llama", "./tiny-llama", "~/tiny-llama"])
def test_a_folder_is_found_from_here_and_from_home(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert found(path, tmp_path).folder == checkpoint


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/nowhere-at-all", "../nowhere"])
def test_a_folder_that_does_not_exist(tmp_path: Path, path: str) -> None:
    assert f"model.path={path}: there is no folder" in refused(path, tmp_path)


def test_a_file_instead_of_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    assert "this is a file; give the folder" in refused(checkpoint / "model.safetensors", tmp_path)


def test_an_empty_setting(tmp_path: Path) -> None:
    assert "no value is set" in refused("", tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert f"the folder {tmp_path} is empty" in refused(tmp_path, tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "has no config.json" in refused(tmp_path, tmp_path)


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    assert "config.json is not readable JSON" in refused(tmp_path, tmp_path)


def test_a_config_without_weights_names_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "has a config but no weights; put model.safetensors" in refused(tmp_path, tmp_path)
    (tmp_path / "tf_model.h5").touch()
    assert "no weights (only tf_model.h5)" in refused(tmp_path, tmp_path)


class Hub(ThreadingHTTPServer):
    """A model hub on this machine with one repository, or with one answer to everything."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], refusal: tuple[int, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.refusal = files, refusal
        self.fetched: set[str] = set()
        self.tokens: set[str | None] = set()


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        files = self.server.files
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if self.server.refusal is not None:
            status, code = self.server.refusal
            self.answer(status, f"your token is {SECRET}".encode(), {"X-Error-Code": code})
        elif path.startswith("/api/models/me/tiny/revision/") and path.endswith(("/main", "/v1", COMMIT)):
            self.answer(200, json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith("/api/models/me/tiny/revision/"):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/me/tiny/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        elif (name := path.removeprefix(f"/me/tiny/resolve/{COMMIT}/")) in files:
            self.server.fetched.add(name)
            etag = hashlib.sha1(files[name]).hexdigest()
            self.answer(200, files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub whose repository has the weights in several formats; huggingface_hub reads its settings when imported."""
    torch.save({"w": torch.ones(2)}, tmp_path / "w.bin")
    files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "model.safetensors": save({"w": torch.ones(2)}),
        "pytorch_model.bin": (tmp_path / "w.bin").read_bytes(),
        "onnx/model.onnx": b"large",
        "consolidated.safetensors": b"large",
        "modeling_tiny.py": b"print('code')",
    }
    server = Hub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "hub-cache")
    yield server
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path, offline: bool = False) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)


def test_a_hub_model_is_downloaded_with_its_commit_and_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    source = found("me/tiny", tmp_path, revision="v1")
    assert (source.commit, source.basename, source.requested) == (COMMIT, "tiny", "me/tiny")
    assert hub.fetched == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (source.folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert hub.tokens == {None}


def test_a_repository_without_safetensors_gives_its_bin(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    source = found("me/tiny", tmp_path)
    assert hub.fetched == {"config.json", "tokenizer.json", "pytorch_model.bin"}
    assert (source.folder / "pytorch_model.bin").is_file()


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
def test_shards_of_any_name_are_downloaded_by_their_index(hub: Hub, tmp_path: Path, whole: str) -> None:
    del hub.files["model.safetensors"]
    data = hub.files.pop("pytorch_model.bin") if whole.endswith(".bin") else save({"w": torch.ones(2)})
    shard = f"{whole}-00001-of-00001{Path(whole).suffix}"
    hub.files |= {shard: data, f"{whole}.index.json": json.dumps({"weight_map": {"w": shard}}).encode()}
    source = found("me/tiny", tmp_path)
    assert hub.fetched == {"config.json", "tokenizer.json", shard, f"{whole}.index.json"}
    assert (source.folder / shard).is_file()


def test_code_is_downloaded_only_where_it_is_trusted(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {
        "modeling_tiny.py": b"WORDS = 'tiny.words'\nHUGE = 'tiny.pt'",
        "tiny.words": b"a b",
        "tiny.pt": b"",
        "more.py": b"",
    }
    found("me/tiny", tmp_path)
    assert not {"modeling_tiny.py", "tiny.words", "more.py"} & hub.fetched
    source = found("me/tiny", tmp_path, trust_remote_code=True)
    assert {"modeling_tiny.py", "tiny.words", "more.py"} <= hub.fetched, "the files that code names, too"
    assert "tiny.pt" not in hub.fetched
    assert (source.folder / "tiny.words").read_bytes() == b"a b"


def test_vocabularies_of_any_name_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    """Of all names that transformers' tokenizers read."""
    names = {"bpe.codes", "vocab.bpe", "vocab.txt", "source.spm", "qwen.tiktoken", "spiece.model", "dict.txt", "emoji.json",
             "prophetnet.tokenizer", "entity_vocab.json", "normalizer.json", "merges.txt"}  # fmt: skip
    hub.files |= dict.fromkeys(names, b"x") | {"notes.txt": b"x", "optimizer.pt": b"x"}
    found("me/tiny", tmp_path)
    assert names <= hub.fetched
    assert not {"notes.txt", "optimizer.pt"} & hub.fetched


def test_the_token_comes_from_the_environment(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    source = found("me/tiny", tmp_path)
    assert hub.tokens == {f"Bearer {SECRET}"}
    assert SECRET not in repr(source)


def test_a_cached_model_needs_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = found("me/tiny", tmp_path)
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "hub-cache", offline=True)
    assert found("me/tiny", tmp_path) == online


def test_a_repository_without_weights(hub: Hub, tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        del hub.files[name]
    assert "has a config but no weights" in refused("me/tiny", tmp_path)


def test_an_unknown_revision(hub: Hub, tmp_path: Path) -> None:
    assert "model.revision=v2: me/tiny has no such branch" in refused("me/tiny", tmp_path, revision="v2")


def test_an_unknown_repository(hub: Hub, tmp_path: Path) -> None:
    assert "no such model on the hub" in refused("me/typo", tmp_path)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("code", ["GatedRepo", ""])
def test_a_gated_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.refusal = (status, code)
    message = refused("me/tiny", tmp_path)
    assert "set HF_TOKEN in the environment" in message
    if code:
        assert "accept the licence on the model's page" in message


def test_a_hub_in_trouble(hub: Hub, tmp_path: Path) -> None:
    hub.refusal = (418, "")
    assert "the hub answered with status 418" in refused("me/tiny", tmp_path)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else answers on this port
        taken.bind(("127.0.0.1", 0))
        use_hub(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path)
        message = refused("me/tiny", tmp_path)
    assert "the hub cannot be reached; connect to the network, or give model.path= a local folder" in message


def test_offline_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path, offline=True)
    assert "unset HF_HUB_OFFLINE, or give model.path= a local folder" in refused("me/tiny", tmp_path)


@pytest.mark.parametrize("path", ["outputs/runs/tiny", "two words", "a//b"])
def test_neither_folder_nor_hub_id(tmp_path: Path, path: str) -> None:
    assert "there is no such folder, and it is not a hub id" in refused(path, tmp_path)
