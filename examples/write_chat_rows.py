"""Write a chat file to try `task=instruct` on: short word problems of one step, with their answers in one sentence.

python examples/write_chat_rows.py chat.jsonl 200
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from loftq_exp.tasks import load_task, task_settings


def chat_rows(count: int) -> list[dict[str, list[dict[str, str]]]]:
    """Return `count` rows of `messages`: a problem by the user, and its number by the assistant."""
    rows = load_task(task_settings("arithmetic", problems="one-step", max_train_samples=count)).rows("train")
    return [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": f"The answer is {row['answer'].rpartition('#### ')[2]}."},
            ]
        }
        for row in rows
    ]


if __name__ == "__main__":
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    place.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(number)), encoding="utf-8")
    print(f"{place}: {number} rows")  # noqa: T201
