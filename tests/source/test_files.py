"""The files copied beside the weights: all that tokenizer and code need, checked from the artifact alone, and no others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers as hf
from sentencepiece import sentencepiece_model_pb2
from zoo import DECODER, ENCODER, FAMILIES, quantize_config, seeded

from loftq_exp.artifact.folder import Initialised
from loftq_exp.errors import UserError
from loftq_exp.initialise import proof
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.files import carry_files
from loftq_exp.source.locate import locate

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = "the ab baa cab"
SPECIAL = {
    "t5": ["<pad>", "</s>", "<unk>"],
    "deberta": ["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
    "llama": ["<unk>", "<s>", "</s>"],
}


def spm(path: Path, special: list[str], kind: int) -> None:
    """A SentencePiece model (1: unigram, 2: BPE) of letters and a few pairs of them."""
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type, model.normalizer_spec.add_dummy_prefix = kind, True
    model.normalizer_spec.name = "identity"
    unknown = next(index for index, piece in enumerate(special) if "unk" in piece.lower())
    pieces = [(piece, 2 if index == unknown else 3, 0.0) for index, piece in enumerate(special)]
    pieces += [(piece, 1, -1.0 - index) for index, piece in enumerate(["ab", "ba", "\u2581", *LETTERS])]
    for piece, type_, score in pieces:
        entry = model.pieces.add()
        entry.piece, entry.type, entry.score = piece, type_, score
    model.trainer_spec.unk_id = unknown
    path.write_bytes(model.SerializeToString())


def byte_pairs(folder: Path) -> None:
    tokens = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<|endoftext|>",
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        "[MASK]",
        "\u0120",
        *LETTERS,
        "ab",
    ]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")


def of_gpt2(folder: Path) -> None:
    byte_pairs(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


def word_pieces(folder: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "ab"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")


def bertweet(folder: Path) -> None:
    settings = {"tokenizer_class": "BertweetTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("".join(f"{letter} 1\n{letter}@@ 1\n" for letter in LETTERS) + "th@@ 1\n")
    (folder / "bpe.codes").write_text("t h 1\n")


def own_code(folder: Path) -> None:
    """A llama whose configuration, model and tokenizer are the checkpoint's own code, its words in a file of any name."""
    config = json.loads((folder / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_foo.FooConfig",
        "AutoModelForCausalLM": "modeling_foo.FooForCausalLM",
    }
    changed = {"model_type": "foo", "architectures": ["FooForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config | changed))
    (folder / "configuration_foo.py").write_text(
        "from transformers import LlamaConfig\nclass FooConfig(LlamaConfig):\n    model_type = 'foo'\n"
    )
    (folder / "modeling_foo.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_foo import FooConfig\n"
        "class FooForCausalLM(LlamaForCausalLM):\n    config_class = FooConfig\n"
    )
    (folder / "tokenization_foo.py").write_text(
        "import json\nfrom pathlib import Path\nfrom transformers import PreTrainedTokenizer\n"
        "class FooTokenizer(PreTrainedTokenizer):\n"
        "    vocab_files_names = {'words_file': 'foo.words'}\n"
        "    def __init__(self, words_file, **options):\n"
        "        self.words = Path(words_file).read_text().split()\n"
        "        super().__init__(**options)\n"
        "    @property\n    def vocab_size(self): return len(self.words)\n"
        "    def get_vocab(self): return {word: index for index, word in enumerate(self.words)}\n"
        "    def _tokenize(self, text, **options): return [letter for letter in text if letter in self.words]\n"
        "    def _convert_token_to_id(self, token): return self.words.index(token) if token in self.words else 0\n"
        "    def _convert_id_to_token(self, index): return self.words[index]\n"
    )
    (folder / "foo.words").write_text(" ".join(LETTERS))
    settings = {
        "tokenizer_class": "FooTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_foo.FooTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "llama": lambda folder: spm(folder / "tokenizer.model", SPECIAL["llama"], 2),
    "mistral": lambda folder: spm(folder / "tokenizer.model", SPECIAL["llama"], 2),
    "t5": lambda folder: spm(folder / "spiece.model", SPECIAL["t5"], 1),
    "deberta v3": lambda folder: spm(folder / "spm.model", SPECIAL["deberta"], 1),
    "bert": word_pieces,
    "falcon": of_gpt2,
}
ROBERTA = hf.RobertaConfig(**ENCODER, type_vocab_size=1, pad_token_id=1)
ALL: dict[str, tuple[str, Callable[[], hf.PreTrainedModel], Callable[[Path], None]]] = {
    **{name: (family.kind, family.make, next((write for start, write in TOKENIZERS.items() if name.startswith(start)), byte_pairs))
       for name, family in FAMILIES.items()},
    "bertweet": ("classification", lambda: hf.RobertaForMaskedLM(ROBERTA), bertweet),
    "own code": ("causal", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), own_code),
}  # fmt: skip
FRESH = """
import json, sys, transformers
from loftq_exp.source.layout import AUTO_CLASSES
found = {}
for name, (folder, kind, trust, text) in json.loads(sys.argv[1]).items():
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model, info = AUTO_CLASSES[kind].from_pretrained(folder, trust_remote_code=trust, output_loading_info=True)
    ids = tokenizer(text)["input_ids"]
    found[name] = [ids, tokenizer.convert_ids_to_tokens(ids), type(model).__name__, sorted(info["missing_keys"])]
print(json.dumps(found))
"""


def made(source: Path, kind: str, trust: bool = False) -> Initialised:
    config = quantize_config(source, source.parent / "made", kind, "dense", model__trust_remote_code=trust)
    return initialise(locate(config.model, config.cache_path), config)


def saved(folder: Path, name: str) -> Path:
    seeded(ALL[name][1]).save_pretrained(folder)
    ALL[name][2](folder)
    return folder


def test_every_family_loads_from_the_artifact_alone(tmp_path: Path) -> None:
    """In a fresh process, with the sources gone: no file of them may be needed, and no module that is in memory."""
    folders, expected = {}, {}
    for name, (kind, _, _) in ALL.items():
        source, trust = saved(tmp_path / name.replace(" ", "-").replace(",", ""), name), name == "own code"
        init = made(source, kind, trust)
        tokenizer = hf.AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
        folders[name] = (str(init.folder), kind, trust, TEXT)
        ids = tokenizer(TEXT)["input_ids"]
        if (model := next(source.glob("*.model"), None)) is not None:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
            start, end = {"t5": ([], [1]), "de": ([1], [2])}.get(name[:2], ([1], []))
            assert processor.encode(TEXT)[:4] == [processor.piece_to_id(piece) for piece in ("\u2581", "t", "h", "e")]
            ids = [*start, *processor.encode(TEXT), *end]
        expected[name] = (ids, list(init.report["head"]))
        shutil.rmtree(source)
    call = [sys.executable, "-c", FRESH, json.dumps(folders)]
    result = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for name, (ids, head) in expected.items():
        assert found[name][0] == ids, name
        assert len(set(ids)) > 4, f"{name}: {found[name][1]}"
        assert all(key.startswith(tuple(head)) for key in found[name][3]), name
    assert found["own code"][2] == "FooForCausalLM"
    assert found["bertweet"][1] == ["<s>", "th@@", "e", "a@@", "b", "b@@", "a@@", "a", "c@@", "a@@", "b", "</s>"]


def test_code_goes_along_only_where_it_is_trusted(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "own code")
    (source / "notes.json").write_text("{}")
    settings = (source / "config.json").read_text()
    (source / "config.json").write_text(settings.replace("configuration_foo.Foo", "someone/foo--configuration_foo.Foo"))
    for trust in (False, True):
        target = tmp_path / str(trust)
        target.mkdir()
        shutil.copyfile(source / "config.json", target / "config.json")
        carry_files(source, target, trust)
        names = {path.name for path in target.iterdir()} - {
            "config.json",
            "generation_config.json",
            "tokenizer_config.json",
        }
        code = {"configuration_foo.py", "modeling_foo.py", "tokenization_foo.py", "foo.words"}
        assert names == (code if trust else set())
        config = json.loads((target / "config.json").read_text())["auto_map"]["AutoConfig"]
        assert config == ("" if trust else "someone/foo--") + "configuration_foo.FooConfig"


def test_only_what_is_asked_for_goes_along_and_no_link_out_of_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Artifacts are pushed to the hub: what else lies in the folder is nobody's business."""
    snapshot, blobs, target = (
        tmp_path / "models--a--b/snapshots/abc",
        tmp_path / "models--a--b/blobs",
        tmp_path / "target",
    )
    for folder in (snapshot, blobs, target):
        folder.mkdir(parents=True)
    (blobs / "1").write_text('{"a": 0}')
    (snapshot / "vocab.json").symlink_to("../../blobs/1")  # as the hub's cache keeps all files
    (tmp_path / "secret").write_text("s3cret")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    for name in (".env", "notes.txt", "optimizer.pt", "train.py", "trainer_state.json", "pytorch_model.bin"):
        (snapshot / name).write_text("{}")
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    (snapshot / "tokenizer").mkdir()
    carry_files(snapshot, target)
    assert {path.name: path.is_symlink() for path in target.iterdir()} == {"vocab.json": False}
    assert "tokenizer.json: left out, because it is a link to another file" in caplog.text


def test_a_tokenizer_that_does_not_come_along_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "source", "bertweet")

    def forgetful(source: Path, folder: Path, trust_remote_code: bool = False) -> None:
        carry_files(source, folder, trust_remote_code)
        (folder / "bpe.codes").unlink()

    monkeypatch.setattr("loftq_exp.artifact.folder.carry_files", forgetful)
    monkeypatch.setattr("loftq_exp.initialise.stage._write_weights", lambda *_: pytest.fail("the long work began"))
    with pytest.raises(
        UserError, match=r"^model\.path=\S+: the tokenizer gives other ids when loaded from the files copied"
    ):
        made(source, "classification")


def test_code_that_lacks_a_module_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "source", "own code")
    skeleton = proof.skeleton

    def without(folder: Path, *arguments: Any) -> hf.PreTrainedModel:
        (folder / "modeling_foo.py").unlink()
        return skeleton(folder, *arguments)

    monkeypatch.setattr(proof, "skeleton", without)
    with pytest.raises(UserError, match=r"^model\.path=\S+: the model does not load from the files copied"):
        made(source, "causal", trust=True)
