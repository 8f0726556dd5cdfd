"""The task: its data, its lengths, and how its answers are made."""

from __future__ import annotations

from dataclasses import dataclass

from loftq_exp.config.schema import ADAPTER, SCORES, setting
from loftq_exp.errors import UserError

NAMES_OF_TASK: dict[str, tuple[str, ...]] = {
    "glue": ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"),
    "summarization": ("xsum", "cnn_dailymail"),
}
"""The choices of `task.name` for each task that is a family of data sets; the other tasks have none."""


@dataclass(frozen=True)
class TaskConfig:
    """What the model is fine-tuned and scored on."""

    kind: str = setting(
        "which module of loftq_exp.tasks reads the data and scores",
        choices=("gsm8k", "arithmetic", "glue", "anli", "squad", "summarization", "wikitext"),
        shapes=(ADAPTER, SCORES),
    )
    name: str | None = setting(
        "which data set of the task, where it is a family: see NAMES_OF_TASK", None, shapes=(ADAPTER, SCORES)
    )
    dataset: str | None = setting(
        "data set on the hub; none: the task has or makes its own, or reads local files", None, shapes=()
    )
    dataset_config: str | None = setting("configuration of the hub data set", None, shapes=())
    dataset_revision: str | None = setting(
        "branch, tag or commit of the hub data set; none: the default branch", None, shapes=()
    )
    train_split: str = setting("split of the hub data set to train on; + joins several", "train", shapes=())
    eval_split: str = setting(
        "split of the hub data set to score on; + joins several, each also scored alone", "test", shapes=()
    )
    train_file: str | None = setting(
        "local .json, .jsonl or .csv file to train on instead of the hub; + joins several", None, shapes=()
    )
    eval_file: str | None = setting("local file to score on instead of the hub; + joins several", None, shapes=())
    max_train_samples: int | None = setting(
        "train on the first so many rows of each split or file (wikitext: blocks in all); none: all",
        None,
        ge=1,
        shapes=(ADAPTER,),
    )
    max_eval_samples: int | None = setting(
        "score the first so many rows of each split or file (wikitext: blocks in all); none: all",
        None,
        ge=1,
        shapes=(SCORES,),
    )
    max_source_length: int = setting(
        "tokens of the prompt, of the texts to classify or of a window at most", 128, ge=1, shapes=(ADAPTER, SCORES)
    )
    max_target_length: int = setting(
        "tokens of the target at most, end of sequence included; also the tokens generated",
        256,
        ge=1,
        shapes=(ADAPTER, SCORES),
    )
    pad_to_max_length: bool = setting(
        "pad each training batch to these lengths instead of its longest row", False, shapes=(ADAPTER,)
    )
    source_prefix: str = setting(
        "put before each document (summarization); t5 expects 'summarize: '", "", shapes=(ADAPTER, SCORES)
    )
    num_beams: int = setting("beams of the search for a summary; 1 is greedy", 1, ge=1, shapes=(SCORES,))
    length_penalty: float = setting(
        "a summary's score is divided by its length to this power (beams only)", 1.0, shapes=(SCORES,)
    )
    no_repeat_ngram_size: int = setting(
        "no so many tokens in a row occur twice in a summary; 0: they may", 0, ge=0, shapes=(SCORES,)
    )
    doc_stride: int = setting(
        "tokens that two windows on a long context share (squad)", 128, ge=0, shapes=(ADAPTER, SCORES)
    )
    n_best_size: int = setting(
        "likeliest starts and ends that are paired to find the answer (squad)", 20, ge=1, shapes=(SCORES,)
    )
    max_answer_length: int = setting("tokens of an answer at most (squad)", 30, ge=1, shapes=(SCORES,))
    block_size: int = setting("tokens of a block (wikitext)", 1024, ge=2, shapes=(ADAPTER, SCORES))
    data_seed: int = setting("seed of generated data (arithmetic)", 0, ge=0, shapes=())

    def __post_init__(self) -> None:
        names = NAMES_OF_TASK.get(self.kind)
        if names is None and self.name is not None:
            raise UserError(f"task.name={self.name}: task {self.kind} is one data set and has no names; leave it out")
        if names is not None and self.name not in names:
            shown = "null" if self.name is None else self.name
            raise UserError(f"task.name={shown}: not a data set of task {self.kind}; choose from: {', '.join(names)}")

    @property
    def label(self) -> str:
        """The task in a word: its kind and, where it is a family, the name."""
        return f"{self.kind}-{self.name}" if self.name else self.kind
