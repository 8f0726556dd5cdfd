from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from loftq_exp.errors import UserError
from loftq_exp.evaluation.evaluate import Evaluation, evaluate
from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.arithmetic import Arithmetic
from loftq_exp.tasks.data import Row
from loftq_exp.tasks.encode import IGNORED, Features, encode, encode_prompt

CONFIG = task_settings(kind="arithmetic", max_eval_samples=7, max_source_length=128, max_target_length=16)
TASK = load_task(CONFIG)
ROWS = TASK.rows("eval")


@pytest.fixture
def model(tiny_llama_dir: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)


def scored(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, batch_size: int = 3) -> Evaluation:
    return evaluate(model, tokenizer, TASK, ROWS, batch_size)


def texts(evaluation: Evaluation) -> list[str]:
    return [sample["generated"] for sample in evaluation.samples]


def test_the_tiny_checkpoint_keeps_its_tokenizer(tiny_llama_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    for row in ROWS:
        assert encode(TASK, row, tokenizer, CONFIG) == encode(TASK, row, tiny_tokenizer, CONFIG)


def test_nll_equals_the_models_own_loss_row_by_row(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    evaluation = scored(model, tiny_tokenizer)
    model.eval()
    total = tokens = 0.0
    for row, sample in zip(ROWS, evaluation.samples, strict=True):
        encoded = encode(TASK, row, tiny_tokenizer, CONFIG)
        loss = model(
            input_ids=torch.tensor([encoded["input_ids"]]), labels=torch.tensor([encoded["labels"]])
        ).loss.item()
        count = sum(label != IGNORED for label in encoded["labels"])
        assert sample["nll"] == pytest.approx(loss, rel=1e-5)
        total, tokens = total + loss * count, tokens + count
    assert evaluation.scores["nll"] == pytest.approx(total / tokens, rel=1e-6)


def test_batched_generation_equals_one_row_at_a_time(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    evaluation = scored(model, tiny_tokenizer)
    assert texts(evaluation) == texts(scored(model, tiny_tokenizer, batch_size=1))
    lengths = {len(encode_prompt(TASK, row, tiny_tokenizer, CONFIG)) for row in ROWS}
    assert len(lengths) > 3, "without rows of different length there would be no padding to go wrong"
    assert len(set(texts(evaluation))) > 3, "a model that writes the same whatever it reads would show nothing"

    model.eval()
    for row, text in zip(ROWS, texts(evaluation), strict=True):
        ids = encode_prompt(TASK, row, tiny_tokenizer, CONFIG)
        written: list[int] = []
        while len(written) < CONFIG.max_target_length and tiny_tokenizer.eos_token_id not in written:
            with torch.no_grad():
                written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
        assert text == tiny_tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_results_do_not_depend_on_the_batch_size(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    first, second = scored(model, tiny_tokenizer, 2), scored(model, tiny_tokenizer, batch_size)
    assert first.scores == pytest.approx(second.scores, rel=1e-6)
    assert [sample["prompt"] for sample in second.samples] == [TASK.prompt(row, tiny_tokenizer) for row in ROWS]
    assert texts(first) == texts(second)
    assert first.tokens_generated == second.tokens_generated > 0


def test_slip_sampling_defaults_of_a_checkpoint_do_not_leak_in(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = scored(model, tiny_tokenizer)
    common = tiny_tokenizer(texts(plain)[0], add_special_tokens=False)["input_ids"]
    settings = model.generation_config
    settings.update(do_sample=True, temperature=0.8, top_p=0.5, repetition_penalty=9.0, no_repeat_ngram_size=1)
    settings.update(suppress_tokens=common, num_beams=3, num_return_sequences=2, min_new_tokens=5)
    before = copy.deepcopy(settings.to_dict())
    assert texts(scored(model, tiny_tokenizer)) == texts(plain)
    assert model.generation_config is settings
    assert settings.to_dict() == before


def test_generation_stops_at_the_end_of_sequence(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Row by row, whatever its batch goes on to write: eos also pads here."""
    longest = scored(model, tiny_tokenizer)
    assert longest.tokens_generated == len(ROWS) * CONFIG.max_target_length
    # Some token that the model does write is made the end-of-sequence token.
    tokenizer = copy.deepcopy(tiny_tokenizer)
    written = tiny_tokenizer(texts(longest)[0], add_special_tokens=False)["input_ids"]
    tokenizer.eos_token = tiny_tokenizer.convert_ids_to_tokens(written[4])
    evaluation = scored(model, tokenizer)
    assert len(ROWS) <= evaluation.tokens_generated < longest.tokens_generated
    assert texts(evaluation) == texts(scored(model, tokenizer, batch_size=1))


def test_the_head_gets_contiguous_states(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Of a slice of the states, torch copies a frozen head's weight once for each row of the batch."""
    seen: list[tuple[bool, int]] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append((args[0].is_contiguous(), args[0].shape[1])))
    evaluation = scored(model, tiny_tokenizer)
    assert all(contiguous for contiguous, _ in seen)
    assert [positions for _, positions in seen].count(1) == len(
        seen
    ) - 3  # three batches of likelihoods, then generation
    assert evaluation.tokens_generated > len(ROWS)


def test_a_model_that_knows_the_answer_is_right(
    tiny_tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM
) -> None:
    """Trained on one row until it recites it: the target, its end and its score."""
    config = task_settings(kind="arithmetic", max_eval_samples=1, max_source_length=64, max_target_length=64)
    (row,) = load_task(config).rows("eval")
    encoded = {name: torch.tensor([ids]) for name, ids in encode(TASK, row, tiny_tokenizer, config).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**encoded).loss.backward()
        optimizer.step()
    evaluation = evaluate(model, tiny_tokenizer, load_task(config), [row], batch_size=4)
    (sample,) = evaluation.samples
    assert sample["generated"] == sample["target"] == TASK.target(row)
    assert sample["correct"] is True
    assert sample["predicted"] == sample["gold"]
    assert evaluation.scores["accuracy"] == 1.0
    assert evaluation.scores["nll"] < 0.1
    assert evaluation.tokens_generated == int((encoded["labels"] != IGNORED).sum())


def test_samples_and_progress(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[int, int, str]] = []
    evaluation = evaluate(model, tiny_tokenizer, TASK, ROWS, 3, lambda *report: seen.append(report))
    assert [report[:2] for report in seen] == [(3, 7), (6, 7), (7, 7)] * 2
    assert len({what for _, _, what in seen}) == 2
    assert set(evaluation.samples[0]) == {"prompt", "target", "generated", "predicted", "gold", "correct", "nll"}
    assert evaluation.scores["accuracy"] == sum(sample["correct"] for sample in evaluation.samples) / 7
    assert math.isfinite(evaluation.scores["nll"])


@pytest.mark.parametrize("adapted", [False, True])
def test_the_model_is_left_as_it_was(
    tiny_tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, adapted: bool
) -> None:
    settings = model.generation_config
    subject = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)) if adapted else model
    subject.train()
    model.model.layers[0].eval()  # a frozen part stays so
    model.config.use_cache = False
    modes = [module.training for module in subject.modules()]
    first, second = scored(subject, tiny_tokenizer), scored(subject, tiny_tokenizer)
    assert first.scores == second.scores
    assert texts(first) == texts(second)
    assert [module.training for module in subject.modules()] == modes
    assert model.config.use_cache is False
    assert model.generation_config is settings
    encoded = encode(TASK, ROWS[0], tiny_tokenizer, CONFIG)
    subject(**{name: torch.tensor([ids]) for name, ids in encoded.items()}).loss.backward()  # training goes on


def test_a_failure_restores_the_model(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tiny_tokenizer, TASK, ROWS, 3, interrupt)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_targets_without_a_token_to_score(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Nothing predicts a text's first token, and a target may be cut to nothing else."""

    class Short(Arithmetic):
        def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> list[Features]:
            features = super().encode(rows, tokenizer)
            return [
                {"input_ids": own["input_ids"][:1], "labels": own["input_ids"][:1]} if index < self.short else own
                for index, own in enumerate(features)
            ]

    task = Short(CONFIG)
    task.short = 1
    for size in (1, 3):
        evaluation = evaluate(model, tiny_tokenizer, task, ROWS, size)
        assert [sample["nll"] is None for sample in evaluation.samples] == [True] + [False] * (len(ROWS) - 1)
        assert evaluation.scores["nll"] == pytest.approx(
            evaluate(model, tiny_tokenizer, TASK, ROWS[1:], 2).scores["nll"]
        )
    task.short = len(ROWS)
    with pytest.raises(UserError, match="no target has a token that can be scored"):
        evaluate(model, tiny_tokenizer, task, ROWS, 3)


def test_no_rows(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no rows"):
        evaluate(model, tiny_tokenizer, TASK, [], 3)


def without_a_number(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> int:
    """Makes the embedding of a token that only one row's prompt holds NaN, and returns that row's number."""
    ids = [set(encode_prompt(TASK, row, tokenizer, CONFIG)) for row in ROWS]
    others = [set().union(*(own for other, own in enumerate(ids) if other != index)) for index in range(len(ROWS))]
    index = next(index for index in reversed(range(len(ROWS))) if ids[index] - others[index])
    token = min(ids[index] - others[index])
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    return index + 1


@pytest.mark.parametrize("kind", [0, 1], ids=["likelihood", "generation"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_nan_is_no_score_and_no_token(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, kind: int, batch_size: int
) -> None:
    row = without_a_number(model, tiny_tokenizer)
    assert not model.config.tie_word_embeddings
    asked = TASK.requests(ROWS, tiny_tokenizer)[kind]
    with pytest.raises(UserError, match=f"^evaluate: the model's output for row {row} is NaN or infinite"):
        evaluate(model, tiny_tokenizer, TASK, ROWS, batch_size, requests=[asked])


def test_a_nan_is_no_beam(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = without_a_number(model, tiny_tokenizer)
    asked = dataclasses.replace(TASK.requests(ROWS, tiny_tokenizer)[1], num_beams=2)
    with pytest.raises(UserError, match=f"output for row {row} is NaN or infinite"):
        evaluate(model, tiny_tokenizer, TASK, ROWS, 3, requests=[asked])


@pytest.mark.parametrize(("value", "refused"), [("nan", True), ("inf", True), ("-inf", False)])
def test_a_nan_is_no_class(tiny_tokenizer: PreTrainedTokenizerFast, value: str, refused: bool) -> None:
    """-inf is what a model may give to a class that it excludes."""
    task = load_task(task_settings(kind="glue", name="sst2"))
    rows = [{"sentence": text, "label": 1} for text in ("one", "two and two")]
    config = BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=512
    )
    classifier = BertForSequenceClassification(config)
    with torch.no_grad():
        classifier.classifier.bias[0] = float(value)
    if not refused:
        assert evaluate(classifier, tiny_tokenizer, task, rows, 2).scores == {"accuracy": 1.0}
        return
    with pytest.raises(UserError, match=r"output for row 1 is NaN or infinite \(labels\)"):
        evaluate(classifier, tiny_tokenizer, task, rows, 2)
