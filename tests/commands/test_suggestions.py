"""Names from other tools are refused with the setting, or what there is instead."""

from __future__ import annotations

import pytest

from loftq_exp.commands.run import compose
from loftq_exp.errors import UserError


@pytest.mark.parametrize(("given", "advice"), [
    ("model=Qwen/Qwen2.5-0.5B", "for a hub id or folder give model.path=Qwen/Qwen2.5-0.5B"),
    ("train.lr=1e-4", "did you mean 'train.learning_rate'?"),
    ("train.fp16=true", "choose train.bf16=true, or false for float32"),
    ("train.packing=true", "task=instruct has task.packing"),
    ("logger=wandb", "every run logs to TensorBoard in its folder, and metrics.json has all numbers"),
])  # fmt: skip
def test_a_name_of_another_tool(given: str, advice: str) -> None:
    with pytest.raises(UserError) as refused:
        compose([given])
    assert str(refused.value).startswith(f"{given}: ")
    assert str(refused.value).endswith(advice)
