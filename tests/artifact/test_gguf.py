"""`--to gguf`: transformers reads the merged model and its tokenizer back, and llama.cpp, where it is installed, agrees."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges
from zoo import ENCODER, quantize_config

from loftq_exp.artifact import gguf_tokenizer
from loftq_exp.artifact.exported import export
from loftq_exp.artifact.folder import Initialised
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.locate import locate

TEXTS = ["Hello world", "  two  blanks\tand\n\n\nlines", "I'll say 1234567 times: don't!", "naïve café, Ünïcode 日本語 🙂",
         "a<|im_end|>b </s> c", "snake_case(x[3]) == 0x1F;", "", " ", "RE'LL we'Ve \r\n x"]  # fmt: skip
CORPUS = [*TEXTS, *Path(__file__).read_text(encoding="utf-8").splitlines()]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]
SPACE = "\u2581"

QWEN2 = GGUF_PRE_TOKENIZER_SPLITS["qwen2"]
SPLITS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False), "qwen2": (QWEN2, False), "llama-bpe": (GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"], True),
    "smaug-bpe": (GGUF_PRE_TOKENIZER_SPLITS["smaug-bpe"], False), "tekken": (GGUF_PRE_TOKENIZER_SPLITS["tekken"], True),
}  # fmt: skip
"""A published pattern of each byte-level pre-tokenizer, and whether it skips the merges of words that are tokens."""


def byte_level(pattern: str | None, ignore_merges: bool = False, first: Any = None) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE with that pattern (None: GPT-2's own), learned from this file, with <s> before a text."""
    tokenizer = Tokenizer(models.BPE())
    steps = [] if first is None else [first]
    steps += [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    tokenizer.model.ignore_merges = ignore_merges
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def sentencepiece(blank_first: bool, scheme: str = "metaspace") -> hf.PreTrainedTokenizerFast:
    """A BPE like llama 2's: blanks are ▁, unknown characters bytes, and any two tokens that make a token merge."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.normalizer = normalizers.Replace(" ", SPACE)
    pieces.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    )
    learned = sorted(pieces.get_vocab().items(), key=lambda item: item[1])
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *(name for name, _ in learned[4:])]
    vocabulary = {name: number for number, name in enumerate(names)}
    scores = {name: -float(number) for name, number in vocabulary.items() if number >= 260}
    merges = generate_merges(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    elif scheme == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first" if blank_first else "never", split=False
        )
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma(**changes: Any) -> dict[str, Any]:
    """Sizes that transformers' GGUF reader assumes of every gemma, and a window shorter than the texts here."""
    return {**ENCODER, "head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8,
            "max_position_embeddings": 128, **changes}  # fmt: skip


LLAMA = {**ENCODER, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
FAMILIES: dict[str, tuple[Callable[[int], hf.PreTrainedConfig], Callable[[], hf.PreTrainedTokenizerFast]]] = {
    "llama": (lambda n: hf.LlamaConfig(**LLAMA | {"vocab_size": n}), lambda: sentencepiece(True, "prepend")),
    "llama tied": (lambda n: hf.LlamaConfig(**LLAMA | {"vocab_size": n, "tie_word_embeddings": True}), lambda: byte_level(None)),
    "mistral": (lambda n: hf.MistralConfig(**LLAMA | {"vocab_size": n}), lambda: sentencepiece(True, "prepend")),
    "qwen2": (lambda n: hf.Qwen2Config(**LLAMA | {"vocab_size": n}), lambda: byte_level(QWEN2)),
    "qwen3": (lambda n: hf.Qwen3Config(**LLAMA | {"vocab_size": n, "head_dim": 128}), lambda: byte_level(QWEN2)),
    "gemma2": (lambda n: hf.Gemma2Config(**gemma(vocab_size=n)), lambda: sentencepiece(False, "gemma")),
    "gemma3": (lambda n: hf.Gemma3TextConfig(**gemma(vocab_size=n, num_hidden_layers=7)), lambda: sentencepiece(False, "gemma")),
}  # fmt: skip
UNREAD: dict[str, Callable[[int], hf.PreTrainedConfig]] = {
    "llama3 rope": lambda n: hf.LlamaConfig(**LLAMA | {"vocab_size": n, "rope_parameters": LLAMA3}),
    "yarn rope": lambda n: hf.LlamaConfig(**LLAMA | {"vocab_size": n, "rope_parameters": YARN}),
    "biases": lambda n: hf.LlamaConfig(**LLAMA | {"vocab_size": n, "attention_bias": True}),
}  # fmt: skip
"""What transformers does not read from a GGUF, or drops."""


def initialised(config: hf.PreTrainedConfig, tokenizer: hf.PreTrainedTokenizerFast, root: Path) -> Initialised:
    """A LoftQ start of a random model, whose norms and biases are not those that a new model has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(root / "source")
    tokenizer.save_pretrained(root / "source")
    settings = quantize_config(root / "source", root / "init", "causal", "dense", save_dtype="float32")
    return initialise(locate(settings.model, settings.cache_path), settings)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Initialised]:
    """The LoftQ start of a family, made once."""
    made: dict[str, Initialised] = {}

    def start(name: str) -> Initialised:
        if name not in made:
            config, tokenizer = FAMILIES[name] if name in FAMILIES else (UNREAD[name], lambda: byte_level(None))
            own = tokenizer()
            made[name] = initialised(config(len(own) + 3), own, tmp_path_factory.mktemp("gguf"))
        return made[name]

    return start


def written(init: Initialised, out: Path, dtype: str) -> Path:
    export(init.folder, out, to="gguf", dtype=dtype)
    (file,) = out.glob("*.gguf")
    return file


def merged(init: Initialised, out: Path) -> Any:
    """The model merged by `--to dense` in float32, which other tests compare with PEFT's."""
    export(init.folder, out, dtype="float32")
    return hf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


IDS = torch.arange(5, 45).remainder(60)[None]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_back_the_merged_model(
    name: str, starts: Callable[[str], Initialised], tmp_path: Path
) -> None:
    init = starts(name)
    expected = merged(init, tmp_path / "dense")
    file = written(init, tmp_path / "out", "float32")
    found: Any = hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    for parameter, values in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[parameter], values, atol=3e-7, rtol=0, msg=parameter)
    torch.testing.assert_close(logits(found, IDS), logits(expected, IDS), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "step"), [("float16", 2**-11), ("bfloat16", 2**-8), ("q8_0", None)])
def test_matrices_are_in_the_type_and_vectors_exact(
    dtype: str, step: float | None, starts: Callable[[str], Initialised], tmp_path: Path
) -> None:
    init = starts("qwen2")
    expected = merged(init, tmp_path / "dense").state_dict()
    file = written(init, tmp_path / "out", dtype)
    found = hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    for name, values in expected.items():
        if values.dim() == 1:
            assert torch.equal(found[name], values), name
            continue
        error = (found[name] - values).abs()
        if step is None:  # Q8_0: codes of -127 to 127 times a float16 scale per 32 values
            blocks, largest = error.reshape(-1, 32), values.reshape(-1, 32).abs().amax(1, keepdim=True)
            assert bool((blocks <= largest / 254 * 1.01 + largest * 2**-11 + 1e-7).all()), name
        else:
            assert bool((error <= values.abs() * step + 1e-7).all()), name
        assert float(error.max()) > 0, name


def test_the_folder_holds_one_model_its_licence_and_where_it_is_from(
    starts: Callable[[str], Initialised], tmp_path: Path
) -> None:
    init = starts("llama tied")
    folder = shutil.copytree(init.folder, tmp_path / "init")
    (folder / "LICENSE").write_text("terms")
    said = export(folder, tmp_path / "out", to="gguf", dtype="q8_0")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["LICENSE", "README.md", "init-q8_0.gguf"]
    assert said == f"{tmp_path / 'out' / 'init-q8_0.gguf'}: 14 weights merged, in q8_0; llama.cpp loads it"
    assert str(folder) in (tmp_path / "out" / "README.md").read_text()
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "init-q8_0.gguf").tensors}
    assert "output.weight" not in names, "tied to token_embd.weight"
    with pytest.raises(UserError, match="already exists and is not empty"):
        export(folder, tmp_path / "out", to="gguf")
    with pytest.raises(UserError, match="--dtype=q8_0: only --to gguf"):
        export(folder, tmp_path / "other", to="dense", dtype="q8_0")
    assert not (tmp_path / "other").exists()


def read_back(tokenizer: hf.PreTrainedTokenizerFast, architecture: str, tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    """The tokenizer as transformers reads it from a GGUF of a tiny model, and what the file says."""
    tokenizer.save_pretrained(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", architecture)
    gguf_tokenizer.add_tokenizer(writer, tmp_path, len(tokenizer) + 5)
    writer.add_tensor("token_embd.weight", torch.zeros(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "t.gguf").fields
    said = {
        name.removeprefix("tokenizer."): field.contents()
        for name, field in fields.items()
        if name.startswith("tokenizer.")
    }
    return hf.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf"), said


@pytest.mark.parametrize("name", SPLITS)
def test_a_byte_level_tokenizer_is_read_back_with_its_pre_tokenizer(name: str, tmp_path: Path) -> None:
    pattern, ignore_merges = SPLITS[name]
    tokenizer = byte_level(pattern, ignore_merges)
    found, said = read_back(tokenizer, "qwen2", tmp_path)
    assert (said["ggml.model"], said["ggml.pre"]) == ("gpt2", name)
    assert (said["ggml.bos_token_id"], said["ggml.eos_token_id"], said["ggml.padding_token_id"]) == (0, 1, 1)
    assert (said["ggml.add_bos_token"], said["ggml.add_eos_token"]) == (True, False)
    assert said["chat_template"] == tokenizer.chat_template
    assert said["ggml.tokens"][-6:] == ["<think>", *(f"[PAD{len(tokenizer) + i}]" for i in range(5))]
    for text in TEXTS:
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_a_tokenizer_that_llama_cpp_follows_but_for_leading_blanks_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_back(sentencepiece(True, "prepend"), "llama", tmp_path)
    assert caplog.text == ""
    read_back(sentencepiece(True), "llama", tmp_path)
    assert "llama.cpp puts a blank before every text, and this tokenizer not before one that begins with" in caplog.text


@pytest.mark.parametrize(
    ("architecture", "first", "scheme"), [("llama", True, "metaspace"), ("gemma3", False, "gemma")]
)
def test_a_sentencepiece_tokenizer_is_read_back(architecture: str, first: bool, scheme: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece(first, scheme)
    found, said = read_back(tokenizer, architecture, tmp_path)
    assert (said["ggml.model"], said["ggml.add_space_prefix"]) == ("llama", first)
    assert said["ggml.token_type"][:5] == [2, 3, 3, 3, 6]
    for text in TEXTS:
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"], text


def unlike(change: Callable[[dict[str, Any]], None], tmp_path: Path, start: hf.PreTrainedTokenizerFast) -> str:
    """The refusal of a tokenizer whose tokenizer.json was changed."""
    start.save_pretrained(tmp_path)
    place = tmp_path / "tokenizer.json"
    described = json.loads(place.read_text())
    change(described)
    place.write_text(json.dumps(described))
    with pytest.raises(UserError) as caught:
        gguf_tokenizer.add_tokenizer(gguf.GGUFWriter(tmp_path / "t.gguf", "llama"), tmp_path, 2000)
    return str(caught.value)


def test_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    split = byte_level(r"\p{N}{1,2}|\s+|[^\s\p{N}]+")
    message = unlike(lambda _: None, tmp_path, split)
    assert (
        "its pre-tokenizer (Split + ByteLevel) is none of gpt-2, llama-bpe, qwen2, smaug-bpe, smollm, tekken" in message
    )
    assert "use --to dense and llama.cpp's convert_hf_to_gguf.py" in message
    message = unlike(lambda described: described["model"].update(ignore_merges=True), tmp_path, byte_level(QWEN2))
    assert "(Split + ByteLevel, ignore_merges)" in message
    message = unlike(lambda d: d.update(normalizer={"type": "Lowercase"}), tmp_path, byte_level(QWEN2))
    assert "it normalizes text by Lowercase" in message
    message = unlike(lambda d: d["model"]["merges"].pop(), tmp_path, sentencepiece(True))
    assert "are no merge, and llama.cpp would join them to" in message
    message = unlike(lambda d: d.update(pre_tokenizer=None), tmp_path, sentencepiece(True))
    assert "neither byte-level nor splits text at blanks" in message
    with pytest.raises(UserError, match="and the embeddings have 100 rows"):
        gguf_tokenizer.add_tokenizer(gguf.GGUFWriter(tmp_path / "t.gguf", "llama"), tmp_path, 100)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda n: hf.PhiConfig(**ENCODER | {"vocab_size": n}), "model type phi is not written; it is written for llama, mistral, qwen2, qwen3, gemma2, gemma3_text"),
        (lambda n: hf.LlamaConfig(**LLAMA | {"vocab_size": n, "hidden_act": "gelu"}), "activation=gelu in config.json, and llama.cpp computes a llama model with silu"),
        (lambda n: hf.Gemma3TextConfig(**gemma(vocab_size=n, query_pre_attn_scalar=64)), "query_pre_attn_scalar=64"),
        (lambda n: hf.Gemma3TextConfig(**gemma(vocab_size=n, layer_types=["full_attention"] * 2)), "full_attention at every 6th layer"),
        (lambda n: hf.LlamaConfig(**LLAMA | {"vocab_size": n, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}), "rope_type=dynamic"),
    ],
)  # fmt: skip
def test_a_model_that_llama_cpp_computes_differently_is_refused(
    config: Callable[[int], hf.PreTrainedConfig], message: str, tmp_path: Path
) -> None:
    tokenizer = byte_level(None)
    init = initialised(config(len(tokenizer)), tokenizer, tmp_path)
    with pytest.raises(UserError) as caught:
        export(init.folder, tmp_path / "out", to="gguf")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


LOOSE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2, "q8_0": 2e-2}
"""How far llama.cpp's logarithms of probabilities may be, relative to their norm. It also rounds the inputs of a product to the matrix's type."""


class LlamaCpp:
    """A GGUF in llama.cpp, with keys and values of attention in float32."""

    def __init__(self, file: Path) -> None:
        package = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
        settings = package.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.verbosity, settings.warmup = 128, 1, -1, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = package.ggml_type.GGML_TYPE_F32
        settings.fit_params = False
        settings.flash_attn_type = package.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = package.Server(settings)

    def tokenize(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        address = f"{self._server.listening_address}/tokenize"
        with urllib.request.urlopen(urllib.request.Request(address, body), timeout=60) as answer:
            ids: list[int] = json.loads(answer.read())["tokens"]
        return ids

    def log_probabilities(self, ids: list[int], vocabulary: int) -> torch.Tensor:
        """The logarithm of the probability of each token after `ids`: (vocabulary,)."""
        # A part of a character would be answered only once it is whole. The bias chooses a letter, after the probabilities.
        letter = {"temperature": 0, "logit_bias": [[self.tokenize("a")[-1], 1000.0]]}
        asked = {"prompt": ids, "n_predict": 1, "n_probs": vocabulary, "cache_prompt": False, **letter}
        (choice,) = self._server.handle_completions(asked)["choices"]
        found = torch.full((vocabulary,), torch.nan)
        for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize("name", [*FAMILIES, *UNREAD])
def test_llama_cpp_computes_the_same(
    name: str, dtype: str, starts: Callable[[str], Initialised], tmp_path: Path
) -> None:
    init = starts(name)
    model = LlamaCpp(written(init, tmp_path / "out", dtype))
    expected = logits(merged(init, tmp_path / "dense"), IDS)[0].log_softmax(-1)
    for count in (3, 17, 40):
        found = model.log_probabilities(IDS[0, :count].tolist(), expected.shape[1])
        assert float((found - expected[count - 1]).norm() / expected[count - 1].norm()) < LOOSE[dtype], count
    tokenizer = hf.AutoTokenizer.from_pretrained(init.folder)
    for text in TEXTS:
        assert model.tokenize(text) == tokenizer(text)["input_ids"], text


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPLITS, "smollm"])
def test_llama_cpp_splits_text_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    pattern, ignore_merges = SPLITS.get(name, (None, False))
    own = byte_level(
        pattern, ignore_merges, pre_tokenizers.Digits(individual_digits=True) if name == "smollm" else None
    )
    config = hf.LlamaConfig(**LLAMA | {"vocab_size": len(own)})
    model = LlamaCpp(written(initialised(config, own, tmp_path), tmp_path / "out", "float32"))
    for text in TEXTS:
        assert model.tokenize(text) == own(text)["input_ids"], text
