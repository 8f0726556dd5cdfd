"""lm-evaluation-harness on the model in memory, through its `HFLM`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loftq_exp.tasks.harness import FEWSHOT_SEED, HarnessResult, HarnessRun, plain, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PYTHON_SEED, OTHER_SEED = 0, 1234
"""The seeds of Python, and of NumPy and torch, that the harness sets before it asks."""
_HASHES = ("doc_hash", "prompt_hash", "target_hash")


def run_harness(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    request: HarnessRun,
    batch_size: int,
    report: Callable[[int, int, str], None],
) -> HarnessResult:
    """Return what the harness finds of `model`, a PEFT model in evaluation mode with its adapter.

    Prompts, stop words, lengths and the checkpoint's generation settings are handled by the harness as from its own command.
    """
    from lm_eval import __version__
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import hash_string

    tasks = request.tasks["tasks"]
    random.seed(PYTHON_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    for task in tasks.values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with quiet():
        lm = _model_class()(
            model.get_base_model(), tokenizer, batch_size, lambda done, total: report(done, total, request.what)
        )
        found: Any = evaluate(lm, request.tasks, limit=request.limit, apply_chat_template=request.apply_chat_template,
                              fewshot_as_multiturn=request.apply_chat_template)  # fmt: skip
    # The harness logs the same as its `task_hashes`.
    hashes = {
        name: hash_string("".join(one[part] for one in own for part in _HASHES))
        for name, own in found["samples"].items()
    }
    traced = {
        name: {"version": found["versions"][name], "num_fewshot": found["n-shot"][name], "hash": hashes[name],
               "documents": found["n-samples"][name]["effective"], "of": found["n-samples"][name]["original"]}
        for name in tasks
    }  # fmt: skip
    samples = [{"task": name} | _sample(one) for name, own in found["samples"].items() for one in own]
    return HarnessResult(plain(found["results"]), plain(samples), plain(traced), __version__, lm.tokens)


def _sample(one: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if name not in _HASHES}


def _model_class() -> Any:
    """Return a subclass of HFLM that reports progress. It is made here, because lm_eval is an extra."""
    from lm_eval.models.huggingface import HFLM

    class Reporting(HFLM):
        """HFLM without bars. The harness calls its cache hook once for each answer."""

        def __init__(self, model: Any, tokenizer: Any, batch_size: int, report: Callable[[int, int], None]) -> None:
            # In the logits' bfloat16 a log-likelihood of 20 has steps of 0.125, and choices tie.
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
            self.report, self.done, self.total, self.tokens = report, 0, 0, 0
            self.cache_hook = self

        def add_partial(self, attr: str, request: Any, answer: Any) -> None:
            """Count an answer."""
            self.done += 1
            if attr == "generate_until":
                self.tokens += len(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
            self.report(min(self.done, self.total), self.total)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            """As HFLM."""
            self.total += len(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            """As HFLM."""
            self.total += len(requests)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            """As HFLM."""
            self.total += len(requests)
            return super().generate_until(requests, disable_tqdm=True)

    return Reporting
