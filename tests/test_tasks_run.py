"""Every task from the command to its scores, on tiny models made here and small files written here."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import saved
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)
from zoo import FAMILIES

from loftq_exp.source.layout import AUTO_CLASSES
from loftq_exp.tasks.glue import COLUMNS, LABELS
from loftq_exp.tasks.gsm8k import ANSWER_MARK, GOLD_MARK, INSTRUCTION

PASSAGE = "Emma Blue lives in Paris. She sells 31 red cups there. Her shop opened in 1998 with two friends. It rains."


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory, pair_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random two-layer BERT without a head."""
    config = BertConfig(
        vocab_size=len(pair_tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=160, pad_token_id=2, initializer_range=0.2, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return saved(BertModel(config), pair_tokenizer, tmp_path_factory.mktemp("encoder"))


DECODERS = [name for name, family in FAMILIES.items() if family.kind == "causal"]
ENCODERS = [name for name, family in FAMILIES.items() if family.kind == "classification"]
SUMMARIZERS = [name for name, family in FAMILIES.items() if family.kind == "seq2seq"]


def write_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """`rows` as a .jsonl file in the current folder."""
    file = Path(name)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def glue_rows(name: str, count: int = 8) -> list[dict[str, Any]]:
    labels = len(LABELS[name])
    return [
        {column: f"{column} {number} is {'good' if number % 2 else 'bad'}" for column in COLUMNS[name]}
        | {"label": number % labels if labels else number * 5 / 7}
        for number in range(count)
    ]


QUICK = ("quant.rank=4", "quant.iter=1", "device=cpu", "train.per_device_train_batch_size=4", "train.logging_steps=1",
         "task.max_train_samples=8", "task.max_eval_samples=8")  # fmt: skip


def finished(cli: Any, *arguments: str, folder: str = "outputs") -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Metrics, samples and output of a run that must succeed, the only one in `folder`."""
    outcome = cli(*QUICK, *arguments, f"output_dir={folder}")
    assert outcome.code == 0, outcome
    (record,) = Path(folder, "runs").glob("*/metrics.json")
    samples = [json.loads(line) for line in (record.parent / "samples.jsonl").read_text().splitlines()]
    return json.loads(record.read_text()), samples, outcome.out


def files(train: Path, *scored: Path) -> tuple[str, str]:
    return f"task.train_file={train}", f"task.eval_file={'+'.join(map(str, scored or (train,)))}"


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scores", "heading"),
    [
        ("cola", {"matthews"}, "matthews"),
        ("sst2", {"accuracy"}, "accuracy"),
        ("mrpc", {"accuracy", "f1"}, "accuracy/f1"),
        ("stsb", {"pearson", "spearman"}, "pearson/spearman"),
        ("qqp", {"accuracy", "f1"}, "accuracy/f1"),
        ("qnli", {"accuracy"}, "accuracy"),
        ("rte", {"accuracy"}, "accuracy"),
        ("wnli", {"accuracy"}, "accuracy"),
    ],
)
def test_glue(cli: Any, encoder: Path, name: str, scores: set[str], heading: str) -> None:
    file = write_rows("rows.jsonl", glue_rows(name))
    metrics, samples, out = finished(
        cli, "model=bert", f"model.path={encoder}", "task=glue", f"task.name={name}", *files(file)
    )
    assert set(metrics["scores"]) == scores
    assert heading in out
    assert metrics["label"].endswith(f"-glue-{name}-bs4-n8")
    assert [[sample[column] for column in COLUMNS[name]] for sample in samples] == [
        [row[column] for column in COLUMNS[name]] for row in glue_rows(name)
    ]
    if name == "stsb":
        assert [sample["gold"] for sample in samples] == pytest.approx([row["label"] for row in glue_rows(name)])
        assert all(isinstance(sample["predicted"], float) for sample in samples)
    else:
        assert {sample["gold"] for sample in samples} == set(LABELS[name])
    if "accuracy" in scores:
        assert metrics["scores"]["accuracy"] == sum(sample["correct"] for sample in samples) / len(samples)


def test_mnli_matched_and_mismatched(cli: Any, encoder: Path) -> None:
    train = write_rows("train.jsonl", glue_rows("mnli"))
    matched, mismatched = (
        write_rows("x_matched.jsonl", glue_rows("mnli", 5)),
        write_rows("x_mismatched.jsonl", glue_rows("mnli", 3)),
    )
    metrics, samples, out = finished(
        cli, "model=bert", f"model.path={encoder}", "task=glue", "task.name=mnli", *files(train, matched, mismatched)
    )
    assert set(metrics["scores"]) == {"accuracy", "accuracy_matched", "accuracy_mismatched"}
    assert [sample["part"] for sample in samples] == ["matched"] * 5 + ["mismatched"] * 3
    for part, count in (("matched", 5), ("mismatched", 3)):
        right = sum(sample["correct"] for sample in samples if sample["part"] == part)
        assert metrics["scores"][f"accuracy_{part}"] == right / count
    assert "accuracy matched/mismatched" in out
    assert metrics["data"]["eval"].count("sha256:") == 2
    (log,) = Path("outputs/runs").glob("*/tensorboard")
    accumulator = EventAccumulator(str(log))
    accumulator.Reload()
    assert "score/accuracy_mismatched" in accumulator.Tags()["scalars"]


def test_anli_has_three_rounds(cli: Any, encoder: Path) -> None:
    rounds = [write_rows(f"test_r{number}.jsonl", glue_rows("mnli", 4)) for number in (1, 2, 3)]
    train = f"task.train_file={'+'.join(map(str, rounds))}"
    metrics, samples, out = finished(
        cli, "model=bert", f"model.path={encoder}", "task=anli", train, *files(rounds[0], *rounds)[1:]
    )
    assert set(metrics["scores"]) == {"accuracy", "accuracy_r1", "accuracy_r2", "accuracy_r3"}
    assert "accuracy r1/r2/r3" in out
    assert len(samples) == metrics["finetune"]["rows"] == 12


@pytest.mark.parametrize("name", ["qnli", "mnli"])
def test_real_glue(cli: Any, encoder: Path, shared_data: Path, name: str) -> None:
    folder = shared_data / "glue" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    metrics, samples, _ = finished(
        cli, "model=bert", f"model.path={encoder}", "task=glue", f"task.name={name}", "task.max_eval_samples=20",
        *files(folder / "train.jsonl", folder / "validation.jsonl"),
    )  # fmt: skip
    assert len(samples) == 20
    assert 0 <= metrics["scores"]["accuracy"] <= 1


def test_a_head_that_learns_gives_a_better_score(cli: Any, encoder: Path) -> None:
    """Head and adapter are trained, saved and loaded again for scoring: the labels follow from one word here."""
    file = write_rows("rows.jsonl", glue_rows("sst2", 16))
    metrics, _, _ = finished(
        cli, "model=bert", f"model.path={encoder}", "task=glue", "task.name=sst2", *files(file), "quant.dropout=0",
        "task.max_train_samples=16", "task.max_eval_samples=16", "train.max_steps=40", "train.learning_rate=1e-2",
        "train.lr_scheduler_type=constant", "train.warmup_ratio=0",
    )  # fmt: skip
    assert metrics["scores"]["accuracy"] == 1.0
    assert metrics["losses"][-1][1] < 0.2


def test_accumulated_batches_do_not_multiply_the_loss(cli: Any, encoder: Path) -> None:
    """transformers leaves it to the model to divide by the accumulated batches, which heads with one label a row do not."""
    file = write_rows("rows.jsonl", glue_rows("stsb"))
    shared = (
        "model=bert", f"model.path={encoder}", "task=glue", "task.name=stsb", *files(file), "quant.dropout=0",
        "train.max_steps=1", "stages=[quantize,finetune]",
    )  # fmt: skip
    losses = []
    for batch, accumulated in ((8, 1), (2, 4)):
        outcome = cli(*QUICK, *shared, f"train.per_device_train_batch_size={batch}",
                      f"train.gradient_accumulation_steps={accumulated}", f"output_dir=out{batch}")  # fmt: skip
        assert outcome.code == 0, outcome
        (record,) = Path(f"out{batch}/runs").glob("*/metrics.json")
        losses.append(json.loads(record.read_text())["losses"][0][1])
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # dropout inside of BERT differs


def test_a_decoder_classifies_in_batches_without_a_pad_token_of_its_own(
    cli: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Its class looks for the end of a text by the config's pad token; here there is none, and the tokenizer's is too large."""
    rows = glue_rows("stsb")
    for row, more in zip(rows, (9, 0, 4, 1, 7, 0, 2, 5), strict=True):
        row["sentence1"] += " and more" * more
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(model)
    arguments = ("model=llama-2", "model.kind=classification", f"model.path={model}", "task=glue", "task.name=stsb",
                 *files(write_rows("rows.jsonl", rows)), "train.max_steps=1", "train.backbone=dense", "train.bf16=false")  # fmt: skip
    alone, together = (
        [sample["predicted"] for sample in finished(cli, *arguments, f"train.per_device_eval_batch_size={size}", folder=str(size))[1]]
        for size in (1, 8)
    )  # fmt: skip
    assert alone == pytest.approx(together, rel=1e-4, abs=1e-6)
    assert len(set(alone)) == len(rows)


# Spans ----------------------------------------------------------------------------------------------------------------


def squad_rows() -> list[dict[str, Any]]:
    asked = (("Who lives in Paris?", "Emma Blue"), ("How many cups?", "31"), ("When did the shop open?", "1998"))
    return [
        {"id": str(number), "title": "t", "context": PASSAGE, "question": question,
         "answers": {"text": [answer], "answer_start": [PASSAGE.index(answer)]}}
        for number, (question, answer) in enumerate(asked)
    ]  # fmt: skip


SHORT_WINDOWS = ("task.max_source_length=64", "task.doc_stride=16")


def test_squad(cli: Any, encoder: Path) -> None:
    metrics, samples, out = finished(
        cli, "model=bert", "model.kind=question-answering", f"model.path={encoder}", "task=squad", *SHORT_WINDOWS,
        *files(write_rows("rows.jsonl", squad_rows())), "train.max_steps=300", "train.learning_rate=5e-3",
        "train.lr_scheduler_type=constant", "quant.dropout=0",
    )  # fmt: skip
    assert set(metrics["scores"]) == {"exact_match", "f1"}
    assert "EM/F1" in out
    assert [sample["gold"] for sample in samples] == [["Emma Blue"], ["31"], ["1998"]]
    assert metrics["scores"]["exact_match"] == 1.0, metrics["losses"]  # it was trained on these


def test_real_squad(cli: Any, encoder: Path, shared_data: Path) -> None:
    file = shared_data / "squad" / "xquad_en.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    metrics, samples, _ = finished(
        cli, "model=bert", "model.kind=question-answering", f"model.path={encoder}", "task=squad",
        "task.max_source_length=160", "task.doc_stride=32", *files(file),
    )  # fmt: skip
    assert len(samples) == 8
    assert 0 <= metrics["scores"]["exact_match"] <= metrics["scores"]["f1"] <= 1


# Summaries ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "columns"), [("xsum", ("document", "summary")), ("cnn_dailymail", ("article", "highlights"))]
)
@pytest.mark.parametrize("model", SUMMARIZERS)
def test_summarization(
    cli: Any, checkpoint: Callable[[str], tuple[str, str]], model: str, name: str, columns: tuple[str, str]
) -> None:
    summary = "Emma Blue sells cups."
    file = write_rows("rows.jsonl", [dict(zip(columns, (PASSAGE, summary), strict=True))] * 4)
    metrics, samples, out = finished(
        cli, *checkpoint(model), "task=summarization", f"task.name={name}",
        *files(file), "task.max_source_length=64", "task.max_target_length=16", "task.num_beams=3",
        "task.source_prefix='summarize: '",
    )  # fmt: skip
    rouge = {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert set(metrics["scores"]) == {"nll"} | rouge | {f"lead3_{score}" for score in rouge}
    # Lead-3 has 19 words, 4 of the 4 gold ones among them (emma, blue, sells, cups).
    assert metrics["scores"]["lead3_rouge1"] == pytest.approx(2 * (4 / 19) * 1 / (4 / 19 + 1))
    assert "Lead-3 R1/R2/RL" in out
    assert samples[0]["gold"] == summary
    assert [sample["nll"] for sample in samples] == pytest.approx([metrics["scores"]["nll"]] * 4), "all rows are alike"


def test_a_summarizer_that_learns_its_rows_recites_them(cli: Any, checkpoint: Callable[[str], tuple[str, str]]) -> None:
    rows = [{"document": f"{word} and more", "summary": f"{word} it is"} for word in ("red", "blue")]
    metrics, samples, _ = finished(
        cli, *checkpoint("bart"), "task=summarization", "task.name=xsum", "quant=lora",
        "quant.iter=0", *files(write_rows("rows.jsonl", rows)), "task.max_target_length=16", "task.num_beams=2",
        "train.max_steps=90", "train.learning_rate=1e-2", "train.lr_scheduler_type=constant", "quant.dropout=0",
        "quant.rank=16",
    )  # fmt: skip
    assert [sample["predicted"] for sample in samples] == [row["summary"] for row in rows], metrics["losses"][-1]
    assert metrics["scores"]["rougeL"] == 1.0


# Running text ---------------------------------------------------------------------------------------------------------


def test_wikitext_from_plain_text(cli: Any, tiny_llama_dir: Path) -> None:
    Path("text.txt").write_text(f" = Cups = \n \n {PASSAGE} \n" * 8)
    metrics, samples, out = finished(
        cli, "model=llama-2", f"model.path={tiny_llama_dir}", "task=wikitext", "task.block_size=32",
        *files(Path("text.txt")),
    )  # fmt: skip
    assert set(metrics["scores"]) == {"nll", "perplexity"}
    assert len(samples) == 8  # task.max_eval_samples counts blocks
    assert {sample["tokens"] for sample in samples} == {31}
    assert "perplexity" in out


def test_real_wikitext_straight_after_initialisation(cli: Any, tiny_llama_dir: Path, shared_data: Path) -> None:
    file = shared_data / "wikitext-2" / "test.raw.txt"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    metrics, samples, _ = finished(
        cli, "model=llama-2", f"model.path={tiny_llama_dir}", "task=wikitext", "task.block_size=64",
        "stages=[quantize,evaluate]", f"task.eval_file={file}",
    )  # fmt: skip
    assert metrics["scored_adapter"] == "initial"
    nll = sum(sample["nll"] for sample in samples) / len(samples)  # each block scores 63 tokens
    assert metrics["scores"]["perplexity"] == pytest.approx(math.exp(nll))


# Families -------------------------------------------------------------------------------------------------------------

EXACT = ("train.bf16=false", "train.backbone=dense", "train.max_steps=2", "train.learning_rate=1e-2")
"""Two steps that are seen in the scores, which can then be computed again to the last digits."""


def trained(kind: str) -> Any:
    """The run's model as others load it: transformers and PEFT, no padding, no batches."""
    (adapter,) = Path("outputs/runs").glob("*/adapter")
    (init,) = {path.parent for path in Path("outputs/inits").glob("*/init_report.json")}
    backbone = AUTO_CLASSES[kind].from_pretrained(init, dtype=torch.float32)
    return PeftModel.from_pretrained(backbone, str(adapter)).eval()


def solutions(count: int = 4) -> list[dict[str, Any]]:
    """Problems of different lengths."""
    return [{"question": f"Emma has {n} cups{' and one more' * n}. How many?", "answer": f"Count {n}{' and 1' * n}.\n#### {2 * n}"}
            for n in range(1, count + 1)]  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_gsm8k_on_each_decoder(
    cli: Any, checkpoint: Callable[[str], tuple[str, str]], tiny_tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    """Each row alone, computed without loftq_exp, has the likelihood and the continuation that it has in a padded batch."""
    metrics, samples, _ = finished(
        cli, *checkpoint(name), "task=gsm8k",
        *files(write_rows("rows.jsonl", solutions())), "task.max_target_length=48", *EXACT,
    )  # fmt: skip
    assert metrics["finetune"]["steps"] == 2
    assert metrics["init"]["weights"] == FAMILIES[name].linears
    model = trained("causal")
    for row, sample in zip(solutions(), samples, strict=True):
        prompt = tiny_tokenizer(f"{row['question']}\n{INSTRUCTION}\n", return_tensors="pt")["input_ids"]
        target = [
            *tiny_tokenizer(row["answer"].replace(GOLD_MARK, ANSWER_MARK), add_special_tokens=False)["input_ids"],
            1,
        ]
        with torch.no_grad():
            both = torch.cat([prompt, torch.tensor([target])], dim=1)
            logits = model(input_ids=both).logits[0, prompt.shape[1] - 1 : -1]
            written = model.generate(
                input_ids=prompt, max_new_tokens=48, do_sample=False, eos_token_id=1, pad_token_id=1
            )
        assert sample["nll"] == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, torch.tensor(target))), rel=1e-4
        )
        own = tiny_tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
        assert sample["generated"] == own


@pytest.mark.parametrize("name", DECODERS)
def test_wikitext_on_each_decoder(cli: Any, checkpoint: Callable[[str], tuple[str, str]], name: str) -> None:
    Path("text.txt").write_text(f" = Cups = \n \n {PASSAGE} \n" * 8)
    metrics, samples, _ = finished(
        cli, *checkpoint(name), "task=wikitext", "task.block_size=32",
        *files(Path("text.txt")),
    )  # fmt: skip
    dtype = metrics["finetune"]["dtype"]
    assert metrics["finetune"] == {"steps": 2, "rows": 25, "backbone": "bnb4", "dtype": dtype, "ranks": 1}
    assert len(samples) == 8


@pytest.mark.parametrize("name", ENCODERS)
def test_glue_on_each_encoder(
    cli: Any, checkpoint: Callable[[str], tuple[str, str]], pair_tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    """Each pair alone, computed without loftq_exp, gets the label that it gets in a padded batch."""
    rows = [
        row | {"sentence": f"{row['sentence']}{' and so on' * number}"} for number, row in enumerate(glue_rows("qnli"))
    ]
    metrics, samples, _ = finished(
        cli, *checkpoint(name), "task=glue", "task.name=qnli",
        *files(write_rows("rows.jsonl", rows)), *EXACT,
    )  # fmt: skip
    assert metrics["init"]["weights"] == FAMILIES[name].linears
    model = trained("classification")
    for row, sample in zip(rows, samples, strict=True):
        inputs = pair_tokenizer(row["question"], row["sentence"], return_tensors="pt")
        if name == "roberta":
            del inputs["token_type_ids"]
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        assert sample["predicted"] == LABELS["qnli"][int(logits.argmax())]


@pytest.mark.parametrize("name", ENCODERS)
def test_anli_and_squad_on_each_encoder(cli: Any, checkpoint: Callable[[str], tuple[str, str]], name: str) -> None:
    metrics, _, _ = finished(cli, *checkpoint(name), "task=anli", *files(write_rows("rows.jsonl", glue_rows("mnli"))))
    assert metrics["finetune"]["steps"] == 2
    assert set(metrics["scores"]) == {"accuracy"}
    metrics, samples, _ = finished(
        cli, *checkpoint(name), "model.kind=question-answering", "task=squad", *SHORT_WINDOWS,
        *files(write_rows("squad.jsonl", squad_rows())), folder="squad",
    )  # fmt: skip
    assert len(samples) == 3
    assert set(metrics["scores"]) == {"exact_match", "f1"}
    assert all(sample["predicted"] in PASSAGE for sample in samples)


# Packed backbones -----------------------------------------------------------------------------------------------------


def trained_on_packed_layers(cli: Any, precision: tuple[str, ...], *arguments: str) -> None:
    record, _, _ = finished(cli, *arguments, "save_format=packed", "train.max_steps=2", *precision)
    assert record["finetune"]["backbone"] == "packed"
    assert record["finetune"]["steps"] == 2
    assert record["scored_adapter"] == "fine-tuned"
    assert record["scores"]


@pytest.mark.parametrize(
    ("model", "precision"),
    [("bart", ("quant.bits=2",)), ("t5", ("quant.bits=3", "quant.double=true", "train.bf16=true"))],
)
def test_summarizers_train_on_packed_layers(
    cli: Any, checkpoint: Callable[[str], tuple[str, str]], model: str, precision: tuple[str, ...]
) -> None:
    file = write_rows("rows.jsonl", [{"document": PASSAGE, "summary": "Emma Blue sells cups."}] * 4)
    trained_on_packed_layers(
        cli, precision, *checkpoint(model), "task=summarization", "task.name=xsum",
        *files(file), "task.max_source_length=64", "task.max_target_length=16", "task.num_beams=2",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "precision"),
    [("mnli", ("quant.type=uniform", "quant.bits=2")), ("stsb", ("quant.bits=3", "quant.allocation=paper"))],
)
def test_classifiers_train_on_packed_layers(cli: Any, encoder: Path, name: str, precision: tuple[str, ...]) -> None:
    trained_on_packed_layers(
        cli, precision, "model=bert", f"model.path={encoder}", "task=glue", f"task.name={name}",
        *files(write_rows("rows.jsonl", glue_rows(name))),
    )  # fmt: skip


def test_spans_are_found_on_packed_layers(cli: Any, encoder: Path) -> None:
    trained_on_packed_layers(
        cli, ("quant.bits=2", "train.bf16=true"), "model=bert", "model.kind=question-answering", f"model.path={encoder}",
        "task=squad", *SHORT_WINDOWS, *files(write_rows("rows.jsonl", squad_rows())),
    )  # fmt: skip
