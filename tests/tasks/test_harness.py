"""Tasks of lm-evaluation-harness on a tiny model, against likelihoods computed here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from weights import in_float32

from loftq_exp.errors import UserError
from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.harness import plain, score_name

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed"
)
DOCUMENTS = [
    {"question": "Two and two are", "choices": ["5", "4", "90 eggs"], "answer": 1},
    {"question": "Ben has eggs and", "choices": ["cups", "12 more eggs"], "answer": 0},
    {"question": "How many", "choices": ["eggs are left?", "red"], "answer": 0},
    {"question": "She sells 31", "choices": ["cups", "and 7"], "answer": 1},
]
LIMIT = 3
QUICK = ("quant.rank=4", "quant.iter=1", "device=cpu", "train.per_device_eval_batch_size=4", "train.bf16=false")
"""In float32 also on a CPU that computes in bfloat16, because likelihoods are compared with those in float32."""


def write_task(folder: Path, name: str = "pick", kind: str = "multiple_choice") -> str:
    """Write a task file of local documents, and return the setting that names its folder."""
    folder.mkdir(exist_ok=True)
    rows = folder / f"{name}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    answers = {
        "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]\n',
        "generate_until": 'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 4}\n'
        "metric_list: [{metric: exact_match}]\n",
    }
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        f'output_type: {kind}\ndoc_to_text: "{{{{question}}}}"\n{answers[kind]}metadata: {{version: 2.5}}\n'
    )
    return f"task.include_path={folder}"


def record_of(folder: str) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """Metrics, samples and folder of the only run of lm_eval below `folder`."""
    (record,) = Path(folder, "runs").glob("*lm_eval*/metrics.json")
    samples = [json.loads(line) for line in (record.parent / "samples.jsonl").read_text().splitlines()]
    return json.loads(record.read_text()), samples, record.parent


def likelihoods(model: Any, tokenizer: Any, document: dict[str, Any]) -> list[float]:
    """The log-likelihood of each choice after the question and a blank."""
    found = []
    start = len(tokenizer(document["question"])["input_ids"])
    for choice in document["choices"]:
        ids = torch.tensor([tokenizer(f"{document['question']} {choice}")["input_ids"]])
        with torch.no_grad():
            each = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(float(each[start - 1 :].sum()))
    return found


@needs_harness
@pytest.mark.parametrize("form", ["dense", "packed", "bnb4"])
def test_the_accuracy_is_that_of_the_likelihoods(cli: Any, tmp_path: Path, form: str) -> None:
    place = write_task(tmp_path / "tasks")
    outcome = cli(*cli.tiny[:2], *QUICK, "task=lm_eval", "task.name=[pick]", place, f"task.max_eval_samples={LIMIT}", f"save_format={form}",
                  "quant.bits=4", "save_dtype=float32", "output_dir=out")  # fmt: skip
    assert outcome.code == 0, outcome
    metrics, samples, _ = record_of("out")
    (start,) = Path("out/inits").glob("*/")
    tokenizer = AutoTokenizer.from_pretrained(start)
    base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model = in_float32(PeftModel.from_pretrained(base, str(start), subfolder="loftq_init")).eval()
    correct = []
    for document, sample in zip(DOCUMENTS[:LIMIT], samples, strict=True):
        own = likelihoods(model, tokenizer, document)
        assert [answer[0] for answer in sample["filtered_resps"]] == pytest.approx(own, abs=1e-3)
        correct.append(own.index(max(own)) == document["answer"])
        assert (sample["task"], sample["doc"], sample["acc"]) == ("pick", document, float(correct[-1]))
    share = sum(correct) / LIMIT
    deviation = (sum((right - share) ** 2 for right in correct) / (LIMIT - 1) / LIMIT) ** 0.5
    assert metrics["scores"] == pytest.approx({"pick_acc": share, "pick_acc_stderr": deviation})
    traced = metrics["scored_with"]
    assert traced["tasks"]["pick"] | {"hash": ""} == {"version": 2.5, "num_fewshot": 0, "hash": "", "documents": LIMIT,
                                                      "of": len(DOCUMENTS)}  # fmt: skip
    assert traced["lm_eval"].startswith("0.4")
    assert len(traced["tasks"]["pick"]["hash"]) == 64


@needs_harness
def test_a_trained_run_is_scored_and_found_again(cli: Any, tmp_path: Path) -> None:
    trained = cli(*cli.tiny[:2], *QUICK, "task=arithmetic", "task.max_train_samples=8", "task.max_eval_samples=2", "train.max_steps=2",
                  "train.learning_rate=0.1", "quant.bits=2", "output_dir=out")  # fmt: skip
    assert trained.code == 0, trained
    (run,) = Path("out/runs").glob("*/")
    command = ("task=lm_eval", "task.name=[pick,write]", write_task(tmp_path / "tasks"), f"score_run={run}", "output_dir=out",
               "device=cpu")  # fmt: skip
    write_task(tmp_path / "tasks", "write", "generate_until")
    outcome = cli(*command)
    assert outcome.code == 0, outcome
    metrics, samples, _ = record_of("out")
    assert metrics["scored_adapter"] == "fine-tuned"
    assert metrics["config"]["quant"]["bits"] == 2
    assert set(metrics["scores"]) == {"pick_acc", "pick_acc_stderr", "write_exact_match", "write_exact_match_stderr"}
    assert {sample["task"] for sample in samples} == {"pick", "write"}
    (start,) = Path("out/inits").glob("*/")
    base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    own = likelihoods(model, AutoTokenizer.from_pretrained(start), DOCUMENTS[0])
    assert [answer[0] for answer in samples[0]["filtered_resps"]] == pytest.approx(own, abs=1e-2)
    assert "evaluate: done before" in cli(*command).out
    (tmp_path / "tasks/pick.jsonl").write_text(json.dumps(DOCUMENTS[0] | {"answer": 0}))
    again = cli(*command)
    assert again.code == 0, again
    assert "done before" not in again.out, "other documents have other scores"


@needs_harness
def test_few_shot_examples_are_the_same_in_the_key_and_in_the_run(cli: Any, tmp_path: Path) -> None:
    place = write_task(tmp_path / "tasks")
    text = (tmp_path / "tasks/pick.yaml").read_text()
    (tmp_path / "tasks/pick.yaml").write_text(text + "fewshot_split: test\n")
    settings = {"name": ["pick"], "include_path": str(tmp_path / "tasks"), "num_fewshot": 2}
    rows = load_task(task_settings("lm_eval", **settings)).rows("eval")
    outcome = cli(
        *cli.tiny[:2], *QUICK, "task=lm_eval", "task.name=[pick]", place, "task.num_fewshot=2", "output_dir=out"
    )
    assert outcome.code == 0, outcome
    _, samples, _ = record_of("out")
    asked = [[request[1] for request in row["requests"]] for row in rows[1:]]
    assert asked == [sample["arguments"] for sample in samples]
    assert all(prompt.count("\n\n") == 2 for documents in asked for prompt, _ in documents)


@needs_harness
@pytest.mark.parametrize(("given", "message"), [
    pytest.param(["task.name=[pikc]"], "task.name=[pikc]: pikc is no task of lm-evaluation-harness nor in task.include_path=",
                 marks=pytest.mark.slow),
    (["task.name=[pick]", "stages=[quantize,finetune]"], "task=lm_eval: scores a model and has no training rows; leave finetune"),
    (["task.name=[pick]", "model.kind=classification"], "task=lm_eval: needs a causal model, model.kind is classification"),
    (["task.name=[broken]"], "task.name=[broken]: lm-evaluation-harness cannot load it ("),
    (["task.name=[pick]", "task.apply_chat_template=true"], "task.apply_chat_template=true: the tokenizer of "),
])  # fmt: skip
def test_what_cannot_be_scored(cli: Any, tmp_path: Path, given: list[str], message: str) -> None:
    place = write_task(tmp_path / "tasks")
    write_task(tmp_path / "tasks", "broken")
    (tmp_path / "tasks/broken.jsonl").unlink()
    assert cli.refused(*cli.tiny[:2], *QUICK, "task=lm_eval", place, *given, "output_dir=out").startswith(message)
    assert not Path("out/inits").exists()


@pytest.mark.parametrize(("given", "message"), [
    ({"name": []}, "task.name=[]: name each task of lm-evaluation-harness once"),
    ({"name": "gsm8k"}, "task.name=gsm8k: a list is needed; give task.name=[A,B]"),
    ({"name": ["a"], "eval_file": "x.jsonl"}, "task.eval_file=x.jsonl: not used by lm_eval, whose tasks name their own data"),
    ({"name": ["a"], "include_path": "nowhere"}, "task.include_path=nowhere: there is no such folder (looked for "),
])  # fmt: skip
def test_settings_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        task_settings("lm_eval", **given)
    assert str(refused.value).startswith(message)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^task=lm_eval: .*not installed; run: pip install 'loftq_exp\[lm-eval\]'$"):
        load_task(task_settings("lm_eval", name=["pick"])).rows("eval")


@pytest.mark.parametrize(("metric", "name"), [
    ("acc,none", "x_acc"), ("acc_norm_stderr,none", "x_acc_norm_stderr"),
    ("exact_match,strict-match", "x_exact_match_strict-match"),
    ("exact_match_stderr,strict-match", "x_exact_match_strict-match_stderr"),
])  # fmt: skip
def test_the_name_of_a_score(metric: str, name: str) -> None:
    assert score_name("x", metric) == name


def test_what_json_lacks_has_no_address_in_its_text() -> None:
    assert plain({"f": [len, torch.tensor([1, 2])], "g": object()}) == {
        "f": ["<built-in function len>", [1, 2]],
        "g": "<object object>",
    }


def test_a_run_that_is_scored_brings_its_model(cli: Any) -> None:
    given = cli.refused("score_run=outputs/runs/x", "quant.bits=2", "stages=[evaluate]")
    assert given == "quant.bits=2: with score_run the model and its initialisation are those of that run; leave it out"
    given = cli.refused("score_run=outputs/runs/x")
    assert given == "score_run=outputs/runs/x: its adapter is scored, not trained; give stages=[evaluate]"
    assert "no run of this version" in cli.refused("score_run=outputs/runs/x", "stages=[evaluate]")
