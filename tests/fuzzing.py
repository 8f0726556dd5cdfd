"""Seeded bad input, case by case in one process: each is refused in one line, or accepted with the right result.

    python tests/fuzzing.py [--cases N] [--seed N] [--write FILE] [TARGET ...]

A failure is a traceback, a refusal of several lines, a hang (10 s of CPU), memory (512 MB more), or a result that differs from an
independent reading of the same bytes. `TARGET:CASE` repeats one case.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import io
import json
import logging
import math
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS, BYTES, ADDRESSES = 10, 512 << 20, 4 << 30
NUMBERS = (0, 1, -1, 2, 7, 10**7, 10**9, 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, math.nan, math.inf)
TEXTS = (
    "",
    " ",
    "x",
    "\0",
    "../../etc/passwd",
    "\ud800",
    "é" * 50,
    "a" * 10_000,
    "hf/hub",
    "None",
    "1e9",
    "{{",
    "{% for %}",
    "🙂",
)
ODD: tuple[Any, ...] = (*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [None], [1, "a"], {"a": None}, {"": []})


class Hang(BaseException):
    """A case took too long."""


@dataclass
class Result:
    """What became of the cases of one target."""

    target: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: float = 0.0
    slowest_case: int = -1


Case = Callable[[random.Random], str]
"""Runs one case; its return value describes the input. Raises AssertionError for a wrong result, UserError for a refusal."""
TARGETS: dict[str, Callable[[Path], Case]] = {}


def target(make: Callable[[Path], Case]) -> Callable[[Path], Case]:
    """Register what makes the cases of a target in an empty folder."""
    TARGETS[make.__name__.replace("_", "-")] = make
    return make


def fuzz(name: str, cases: int, seed: int = 0, only: int | None = None) -> Result:
    """Run `cases` cases of a target, or the one with the number `only`."""
    from loftq_exp.errors import UserError

    result, began = Result(name), time.process_time()
    before, limits = logging.root.manager.disable, resource.getrlimit(resource.RLIMIT_AS)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.chdir(folder):
        warnings.simplefilter("ignore")
        run = TARGETS[name](Path(folder))
        logging.disable(logging.CRITICAL)
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESSES, limits[1]))
        try:
            for number in range(cases) if only is None else (only,):
                _one(result, run, random.Random(f"{name} {seed} {number}"), number, UserError)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            logging.disable(before)
    result.seconds = time.process_time() - began
    return result


def _one(result: Result, run: Case, rng: random.Random, number: int, refusal: type[Exception]) -> None:
    result.cases += 1
    started, peak, problem = time.process_time(), _peak(), None
    try:
        with _at_most(SECONDS) as hung:
            run(rng)
        result.accepted += 1
    except refusal as error:
        result.refused += 1
        message = str(error)
        kind = re.sub(r"/\S+|\d+|'[^']*'|=\S*", "~", message)[:60]
        result.kinds[kind] += 1
        if "\n" in message or "MemoryError" in message or len(message) > 25_000:
            problem = f"no single short line: {message[:300]!r}"
    except BaseException as error:  # a panic is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-4:]))
        problem = f"{type(error).__name__}: {str(error)[:200]} at {places}"
    if hung[0]:
        problem = f"took over {SECONDS} s"
    if (grown := _peak() - peak) > BYTES:
        problem = f"took {grown >> 20} MB"
    if problem:
        result.failures.append(f"{result.target}:{number}: {problem}")
    if (took := time.process_time() - started) > result.slowest:
        result.slowest, result.slowest_case = took, number


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[list[bool]]:
    hung = [False]

    def alarm(*_: Any) -> None:
        hung[0] = True
        raise Hang

    old = signal.signal(signal.SIGPROF, alarm)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield hung
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# Changes of bytes and of JSON ---------------------------------------------------------------------------------------------


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to three changes of its bytes."""
    for _ in range(rng.randint(1, 3)):
        data = _changed_once(rng, data)
    return data


def _changed_once(rng: random.Random, data: bytes) -> bytes:
    at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    to = min(to, at + rng.choice((1, 8, 100, len(data))))
    noise = rng.randbytes(rng.choice((1, 4, 40)))
    before, after = data[:at], data[at:]
    changes = (before, after, before + data[to:], before + noise + after, before + data[at:to] + after, b"",
               before + noise + data[at + len(noise) :], b"\xef\xbb\xbf" + data, before + b"\0" * (to - at) + data[to:],
               data.decode("latin-1").encode("utf-16"), bytes(rng.sample(list(data[:64]), len(data[:64]))) + data[64:])  # fmt: skip
    return rng.choice(changes)


def changed_json(rng: random.Random, value: Any, most: int = 3) -> str:
    """The JSON text of `value` with up to `most` odd values, missing, doubled or additional entries."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, most)):
        places = list(_places(value))
        holder, key = rng.choice(places)
        what = rng.randrange(10)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[rng.choice((key.upper(), key + "s", rng.choice(TEXTS)))] = holder.pop(key)
        elif what == 2 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(rng.choice(holder)))
        elif what == 3:
            holder[key] = copy.deepcopy(_value(rng.choice(places)))
        elif what == 4:
            holder[key] = [holder[key]] * rng.choice((1, 3))
        elif what == 5 and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * rng.choice((-1, 2, 10**6, 0.5))
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        if not value:
            break
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.02:
        deep = rng.choice((2_000, 100_000))
        text = text[:-1] + f', "deep": {"[" * deep}{"]" * deep}' + text[-1:]
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    left = [value]
    while left:
        holder = left.pop()
        for key in holder if isinstance(holder, dict) else range(min(len(holder), 20)):
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                left.append(holder[key])


def _value(place: tuple[Any, Any]) -> Any:
    return place[0][place[1]]


def put(path: Path, data: str | bytes) -> None:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))


# Weights ------------------------------------------------------------------------------------------------------------------


def small_weights() -> dict[str, Any]:
    import torch

    values = torch.Generator().manual_seed(0)
    return {f"model.layers.{layer}.{name}.weight": torch.randn(4, 6, generator=values).to(dtype)
            for layer, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)) for name in ("q", "k")}  # fmt: skip


def read_independently(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a safetensors file as its format says: type, shape and bytes by name."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"], data[8 + length :][slice(*entry["data_offsets"])])
            for name, entry in header.items()}  # fmt: skip


def same_as_files(folder: Path, shards: list[Path]) -> None:
    """Assert that our reader gives the bytes that an independent one finds."""
    import torch

    from loftq_exp.source.finite import check_finite
    from loftq_exp.source.tensors import open_tensors

    expected: dict[str, tuple[str, list[int], bytes]] = {}
    with open_tensors(folder) as tensors:
        for shard in shards:
            expected |= read_independently(shard.read_bytes())
        assert set(tensors.names) == set(expected), "other names"
        for name in tensors.names:
            found = tensors.read(name)
            _, shape, data = expected[name]
            assert list(found.shape) == shape, "another shape"
            assert found.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == data, "other bytes"
        check_finite(tensors, tensors.names)


@target
def safetensors(folder: Path) -> Case:
    """The header and the body of one file."""
    from safetensors.torch import save

    good = save(small_weights(), {"format": "pt"})
    length = int.from_bytes(good[:8], "little")
    header, place = json.loads(good[8 : 8 + length]), folder / "model.safetensors"

    def case(rng: random.Random) -> str:
        if rng.random() < 0.6:
            text = changed_json(rng, header).encode("utf-8", "surrogatepass")
            size = (
                len(text)
                if rng.random() < 0.9
                else rng.choice((0, 1, len(text) - 1, len(text) + 1, 10**7, 2**40, 2**64 - 1))
            )
            data = size.to_bytes(8, "little") + text + good[8 + length :]
        else:
            data = changed_bytes(rng, good)
        put(place, data)
        same_as_files(folder, [place])
        return "file"

    return case


@target
def index(folder: Path) -> Case:
    """model.safetensors.index.json of three shards."""
    from safetensors.torch import save_file

    weights, shards = small_weights(), {}
    for number in range(3):
        shard = f"model-0000{number + 1}-of-00003.safetensors"
        own = {name: value for name, value in weights.items() if f"layers.{number}" in name}
        save_file(own, folder / shard, {"format": "pt"})
        shards |= dict.fromkeys(own, shard)
    good = {"metadata": {"total_size": 288}, "weight_map": shards}
    place, names = folder / "model.safetensors.index.json", set(shards.values())
    (folder.parent / "outside.safetensors").unlink(missing_ok=True)

    def case(rng: random.Random) -> str:
        put(place, changed_json(rng, good) if rng.random() < 0.8 else changed_bytes(rng, json.dumps(good).encode()))
        try:
            named = set(json.loads(place.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            named = set()
        same_as_files(folder, [folder / name for name in sorted(named & names)])
        assert named, "no shard was named"
        assert named <= names, "a shard that is not there"
        return "index"

    return case


# Models -------------------------------------------------------------------------------------------------------------------


def small_models(folder: Path) -> dict[str, Path]:
    """A model of four families with a tokenizer, by kind."""
    import transformers as hf
    from checkpoints import byte_level_bpe
    from tokenizers import processors

    from loftq_exp.tasks.arithmetic import generate

    texts = [next(generate("train", seed))["question"] for seed in range(50)]
    tokenizer = byte_level_bpe(texts, 300, ("<s>", "</s>", "<pad>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                         chat_template="{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}")  # fmt: skip
    one: dict[str, Any] = {"vocab_size": len(wrapped), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
                           "pad_token_id": 2}  # fmt: skip
    bart: dict[str, Any] = {"vocab_size": len(wrapped), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
                            "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                            "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
                            "decoder_start_token_id": 1, "forced_eos_token_id": None}  # fmt: skip
    models = {
        "causal": hf.LlamaForCausalLM(hf.LlamaConfig(**one)),
        "classification": hf.BertForSequenceClassification(hf.BertConfig(**one)),
        "seq2seq": hf.BartForConditionalGeneration(hf.BartConfig(**bart)),
    }
    places = {}
    for kind, model in models.items():
        places[kind] = folder / kind
        model.save_pretrained(places[kind])
        wrapped.save_pretrained(places[kind])
    return places


@target
def config(folder: Path) -> Case:
    """config.json and generation_config.json: located, its kind found, and its layout laid on the weights."""
    from loftq_exp.config import ModelConfig
    from loftq_exp.source.kind import kind_of
    from loftq_exp.source.layout import find_layout
    from loftq_exp.source.locate import locate
    from loftq_exp.source.tensors import open_tensors
    from loftq_exp.whole import read_object

    places = small_models(folder)
    good = {kind: json.loads((place / "config.json").read_text()) for kind, place in places.items()}
    shapes, targets = {}, {}
    for kind, place in places.items():
        with open_tensors(place) as tensors:
            shapes[kind] = tensors.shapes()
        targets[kind] = {target.tensor for target in find_layout(place, kind, shapes[kind]).targets}
    more = ("auto_map", "num_labels", "id2label", "rope_scaling", "quantization_config", "layer_types", "torch_dtype", "dtype",
            "tie_word_embeddings", "is_decoder", "head_dim", "num_key_value_heads", "problem_type", "architectures", "num_experts",
            "text_config", "model_type", "transformers_version", "pruned_heads", "_attn_implementation", "use_cache")  # fmt: skip

    def case(rng: random.Random) -> str:
        kind = rng.choice(("causal", "causal", "classification", "seq2seq"))
        place, stated = places[kind], dict(good[kind])
        if rng.random() < 0.3:
            stated[rng.choice(more)] = copy.deepcopy(rng.choice(ODD))
        put(
            place / "config.json",
            changed_json(rng, stated, 2) if rng.random() < 0.9 else changed_bytes(rng, json.dumps(stated).encode()),
        )
        source = locate(ModelConfig(path=str(place)), folder / "cache")
        kind_of(read_object(source.folder / "config.json"), kind, ModelConfig(path=str(place)))
        layout = find_layout(source.folder, kind, shapes[kind])
        assert {target.tensor for target in layout.targets} == targets[kind], "other targets"
        assert all(shapes[kind][target.tensor] == target.shape for target in layout.targets), "other shapes"
        return kind

    return case


ROWS = {
    "gsm8k": [{"question": f"What is {n} + 2?", "answer": f"{n} + 2 = {n + 2}.\n#### {n + 2}"} for n in range(3)],
    "instruct": [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi \u2028 there"}]},
    ],
    "instruct-prompt": [{"prompt": "2 + 2?", "completion": "4"}, {"prompt": "é", "completion": "🙂 ok"}],
    "instruct-alpaca": [{"instruction": "Add.", "input": "2 2", "output": "4"}, {"instruction": "Hi.", "output": "Hi"}],
    "wikitext": [{"text": " = Title = "}, {"text": ""}, {"text": "some words of running text " * 4}],
    "summarization": [{"document": "a long text " * 5, "summary": "short"}, {"document": "another", "summary": "one"}],
    "glue-rte": [{"sentence1": "a b", "sentence2": "c", "label": 1}, {"sentence1": "a", "sentence2": "b c", "label": 0}],
    "glue-stsb": [{"sentence1": "a b", "sentence2": "c", "label": 2.5}, {"sentence1": "a", "sentence2": "b c", "label": 0.0}],
    "anli": [{"premise": "a b", "hypothesis": "c", "label": 2}, {"premise": "a", "hypothesis": "b c", "label": 0}],
    "squad": [{"id": "1", "context": "Tom has 3 apples", "question": "How many?", "answers": {"text": ["3"], "answer_start": [8]}}],
}  # fmt: skip


def task_of(name: str, place: Path, **more: Any) -> Any:
    from loftq_exp.config import TaskConfig
    from loftq_exp.config.schema import build
    from loftq_exp.tasks import load_task

    kind, _, data = name.partition("-")
    settings = {"kind": kind, "train_file": str(place), "eval_file": str(place)} | more
    settings |= {"name": data} if kind == "glue" else {"name": "xsum"} if kind == "summarization" else {}
    return load_task(build(TaskConfig, settings, "task."))


@target
def tokenizer(folder: Path) -> Case:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template, and rows encoded with them."""
    import loftq_exp.training.preflight as preflight
    from loftq_exp import compose
    from loftq_exp.artifact.folder import Initialised
    from loftq_exp.source.layout import skeleton

    place = small_models(folder)["causal"]
    originals = {
        name: (place / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }
    originals["special_tokens_map.json"] = json.dumps(
        {"eos_token": "</s>", "pad_token": {"content": "<pad>", "lstrip": False}}
    ).encode()
    parsed = {name: json.loads(data) for name, data in originals.items() if name.endswith(".json")}
    small = {name: value for name, value in parsed["tokenizer.json"].items() if name != "model"}
    more = ("tokenizer_class", "auto_map", "model_max_length", "chat_template", "added_tokens_decoder", "extra_special_tokens",
            "model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "add_bos_token")  # fmt: skip
    model, rows = skeleton(place, "causal"), {}
    for name in ("gsm8k", "instruct"):
        put(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS[name]))
        rows[name] = task_of(name, folder / f"{name}.jsonl")
    settings = compose(["model=llama-2", f"model.path={place}", "task=gsm8k", "task.max_target_length=8"])
    found = {name: (task, task.rows("train")) for name, task in rows.items()}

    def case(rng: random.Random) -> str:
        for name, data in originals.items():
            put(place / name, data)
        name = rng.choice(
            (
                "tokenizer.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "chat_template.jinja",
            )
        )
        if name in parsed and rng.random() < 0.85:
            value = parsed[name]
            if name == "tokenizer_config.json" and rng.random() < 0.5:
                value = value | {rng.choice(more): copy.deepcopy(rng.choice(ODD))}
            if name == "tokenizer.json" and rng.random() < 0.7:  # beside the vocabulary, where most of the format is
                text = changed_json(rng, small, 2)
                put(
                    place / name,
                    f'{text[:-1]}, "model": {json.dumps(value["model"])}}}' if text.endswith("}") else text,
                )
            else:
                put(place / name, changed_json(rng, value, 2))
        else:
            put(place / name, changed_bytes(rng, originals[name]))
        task, own = found[rng.choice(("gsm8k", "instruct"))]
        before = preflight.skeleton
        preflight.skeleton = lambda *_, **__: model
        try:
            prepared = preflight.prepare(Initialised(place, {}), task, own, own, settings)
        finally:
            preflight.skeleton = before
        ids = [token for one in prepared.train for token in one["input_ids"]]
        assert ids, "nothing is encoded"
        assert all(isinstance(token, int) and 0 <= token < model.config.vocab_size for token in ids), (
            "no ids of the model"
        )
        return name

    return case


# Rows ---------------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """JSON with line feeds, as a task reads text."""
    if isinstance(value, str):
        return re.sub("\r\n?", "\n", value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


@target
def rows(folder: Path) -> Case:
    """Rows of every task as .jsonl, .json, .csv and .txt, read and counted."""
    import loftq_exp.metrics  # noqa: F401  # takes seconds, and a task imports it for its first row

    tasks = {(name, form): task_of(name, folder / f"rows.{form}") for name in ROWS for form in ("jsonl", "json", "csv")}
    tasks["wikitext", "txt"] = task_of("wikitext", folder / "rows.txt")

    def text_of(rng: random.Random, name: str, form: str) -> str | bytes:
        good = ROWS[name]
        if form == "csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, list(good[0]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(good)
            return changed_bytes(rng, text.getvalue().encode())
        if form == "txt":
            return changed_bytes(rng, "\n".join(row["text"] for row in good).encode())
        if rng.random() < 0.7:
            if form == "json":
                return changed_json(rng, good)
            lines = [changed_json(rng, row) if rng.random() < 0.6 else json.dumps(row) for row in good]
            return rng.choice(("\n", "\r\n", "\n\n", "\r")).join(lines)
        return changed_bytes(rng, "\n".join(map(json.dumps, good)).encode())

    def case(rng: random.Random) -> str:
        name, form = rng.choice(list(tasks))
        place, task = folder / f"rows.{form}", tasks[name, form]
        put(place, text_of(rng, name, form))
        found = task.rows("train")
        text = place.read_bytes().decode("utf-8-sig")
        if form == "txt":
            assert [row["text"] for row in found] == re.split("\r\n?|\n", text), "other lines"
        elif form == "csv":
            expected = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
            assert len(found) == len(expected) - 1, "other rows"
        else:
            array = form == "json" and text.lstrip().startswith("[")
            expected = (
                json.loads(text) if array else [json.loads(line) for line in re.split("\r\n?|\n", text) if line.strip()]
            )
            assert len(found) == len(expected), "other rows"
            for one, other in zip(found, expected, strict=True):
                assert json.dumps(_plain(one)) == json.dumps(_plain(other)), "another row"
        return f"{name}.{form}"

    return case


# Settings -----------------------------------------------------------------------------------------------------------------


@target
def overrides(folder: Path) -> Case:
    """Settings of any value through Hydra's grammar and our schema; one in forty through the whole composition."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from loftq_exp import compose
    from loftq_exp.commands.run import _overrides
    from loftq_exp.config import RunConfig
    from loftq_exp.config.schema import dotted_names
    from loftq_exp.errors import UserError

    names, parser = list(dotted_names(RunConfig)), OverridesParser.create()
    choices = {"task": ("gsm8k", "arithmetic", "wikitext", "instruct"), "quant": ("loftq", "qlora", "calibrated", "lora"),
               "model": ("llama-2", "mistral", "deberta")}  # fmt: skip
    trees = {task: compose([f"task={task}"]).to_dict() for task in choices["task"]}
    words = ("4", "2", "nf", "uniform", "int", "[quantize]", "[]", "{}", "null", "true", "1e9", "1e400", "nan", "inf", "-inf", "''", "'a b'",
             "${seed}", "${nope}", "${oc.env:HOME}", "${", "?", "???", "[1,2", "{a:1}", "1,2", "~", "=", "a=b", "\\", "\t", "\0", "é", "🙂",
             "0x10", "1_000", "+1", "-0", "00", "glob(*)", "choice(1,2)", "range(1,3)", "int('x')", "[" * 200, "a" * 5000, "\ud800", "\n")  # fmt: skip

    def value(rng: random.Random) -> str:
        return rng.choice(
            (rng.choice(words), str(rng.choice(NUMBERS)), json.dumps(rng.choice(ODD), ensure_ascii=False))
        )

    def override(rng: random.Random) -> str:
        if rng.random() < 0.1:
            group = rng.choice(list(choices))
            return f"{group}={rng.choice((*choices[group], 'nope', value(rng)))}"
        name = (
            rng.choice(names)
            if rng.random() < 0.9
            else rng.choice(("nope", "quant.bit", "", ".", "quant", "seed.x", "hydra.nope", "a b"))
        )
        return f"{rng.choice(('', '', '', '', '+', '++', '~'))}{name}{rng.choice(('=', '=', '=', '=', '', '@', '=='))}{value(rng)}"

    def case(rng: random.Random) -> str:
        given = [override(rng) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.025:
            check(compose(given))
            return "composed"
        tree = copy.deepcopy(trees[rng.choice(choices["task"])])
        try:
            found = [
                (each.key_or_group, each.value())
                for each in parser.parse_overrides(_overrides(given))
                if not each.is_sweep_override()
            ]
        except HydraException as error:
            raise UserError(str(error)) from error
        for name, new in found:
            holder, parts = tree, name.split(".")
            for part in parts[:-1]:
                holder = (
                    holder[part]
                    if isinstance(holder.get(part), dict)
                    else holder.setdefault(part, {})
                    if part not in holder
                    else {}
                )
            holder[parts[-1]] = OmegaConf.to_container(new) if OmegaConf.is_config(new) else new
        check(RunConfig.from_mapping(tree))
        return "settings"

    def check(accepted: RunConfig) -> None:
        plain = accepted.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) is not None
        assert RunConfig.from_mapping(json.loads(json.dumps(plain))) == accepted, "other settings after a record"
        assert accepted.label

    return case


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "targets", nargs="*", help="safetensors, index, config, tokenizer, rows, overrides; by default all"
    )
    arguments.add_argument("--cases", type=int, default=10_000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--write", type=Path, help="JSON file for the counts")
    given = arguments.parse_args()
    import torch

    torch.set_num_threads(1)
    rows_, failed = [], 0
    for named in given.targets or TARGETS:
        name, _, only = named.partition(":")
        result = fuzz(name, given.cases, given.seed, int(only) if only else None)
        failed += len(result.failures)
        out = sys.stdout.write
        out(f"{name}: {result.cases} cases, {result.accepted} accepted, {result.refused} refused, {len(result.failures)} failures, "
            f"{result.seconds:.0f} s of CPU, slowest {result.slowest:.2f} s ({name}:{result.slowest_case})\n")  # fmt: skip
        kinds = Counter(re.sub(r"^.*?: |[\d~]+", "", failure)[:160] for failure in result.failures)
        for kind, count in kinds.most_common(25):
            example = next(each for each in result.failures if re.sub(r"^.*?: |[\d~]+", "", each)[:160] == kind)
            out(f"  {count} x {example}\n")
        sys.stdout.flush()
        rows_.append({"target": name, "cases": result.cases, "accepted": result.accepted, "refused": result.refused,
                      "failures": len(result.failures), "seed": given.seed, "slowest": round(result.slowest, 2)})  # fmt: skip
        if given.write:
            write(given.write, rows_)
    return int(failed > 0)


COLUMNS = (("bad input", "what"), ("how it is tried", "how"), ("cases", "cases"), ("accepted, with the right result", "accepted"),
           ("refused in one line", "refused"), ("failures", "failures"))  # fmt: skip


def write(place: Path, counts: list[dict[str, Any]]) -> None:
    """Put the counts of these targets into a table of docs/results. Those of other targets stay."""
    before = json.loads(place.read_text())["rows"] if place.exists() else []
    found = {row["target"]: row for row in [*before, *counts]}
    for name, row in found.items():
        row["what"] = (TARGETS[name].__doc__ or "").partition(":")[0].rstrip(".")
        row["how"] = f"`python tests/fuzzing.py {name}`"
    columns = [{"name": name, "key": key} for name, key in COLUMNS]
    rows_ = [found[name] for name in TARGETS if name in found]
    facts = {"command": "python tests/fuzzing.py --cases 10000 --write docs/results/fuzz.json"}
    place.write_text(json.dumps({"facts": facts, "columns": columns, "rows": rows_}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
