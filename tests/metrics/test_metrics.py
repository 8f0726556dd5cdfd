"""Each metric against values worked out by hand."""

from __future__ import annotations

import math
import socket
from typing import Any

import evaluate
import pytest

from loftq_exp.metrics import METRICS, compute
from loftq_exp.metrics.sentences import sentences
from loftq_exp.metrics.squad import best_exact_match, best_f1, normalised


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a metric asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", METRICS)
def test_each_is_a_module_of_evaluate_that_says_what_it_is(name: str) -> None:
    metric = METRICS[name](keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    assert metric.description
    assert metric.citation
    assert set(metric.features) == {"predictions", "references"}


# Of 6: 2 true positives, 1 false positive, 1 false negative, 2 true negatives.
PREDICTED, GOLD = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]


def test_labels() -> None:
    scores = compute(("accuracy", "f1", "matthews"), PREDICTED, GOLD)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["f1"] == pytest.approx(2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3))
    assert scores["matthews"] == pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))


def test_f1_is_that_of_label_one() -> None:
    assert compute(("f1",), [0, 0, 0, 1], [0, 0, 1, 1])["f1"] == pytest.approx(2 * 1 * 0.5 / 1.5)


@pytest.mark.parametrize("gold", [[0, 1, 1], [1, 1, 1]])
def test_a_model_that_always_says_the_same_has_no_correlation(gold: list[int]) -> None:
    assert compute(("matthews",), [1, 1, 1], gold)["matthews"] == 0
    assert compute(("f1",), [0, 0, 0], gold)["f1"] == 0
    assert compute(("pearson", "spearman"), [2.5, 2.5, 2.5], gold) == {"pearson": 0, "spearman": 0}


def test_correlations() -> None:
    predicted, gold = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 2.0, 5.0]
    # Deviations (-1.5, -.5, .5, 1.5) and (-1.5, -.5, -.5, 2.5): 6 / sqrt(5 * 9).
    assert compute(("pearson",), predicted, gold)["pearson"] == pytest.approx(6 / math.sqrt(45))
    # Ranks (1, 2, 3, 4) and (1, 2.5, 2.5, 4): deviations (-1.5, -.5, .5, 1.5) and (-1.5, 0, 0, 1.5): 4.5 / sqrt(5 * 4.5).
    assert compute(("spearman",), predicted, gold)["spearman"] == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert compute(("spearman",), [1.0, 2.0, 3.0], [1.0, 10.0, 1000.0])["spearman"] == pytest.approx(1)
    assert compute(("pearson", "spearman"), [1.0], [2.0]) == {"pearson": 0, "spearman": 0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a an the theory", "theory"),
        ("U.S.-led", "usled"),
        ("An\n$5 'apple'", "5 apple"),
        ("the", ""),
    ],
)
def test_squad_normalisation(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_squad() -> None:
    assert best_exact_match("the Tower.", ["a bridge", "Tower"]) == 1
    assert best_f1("the tall red tower", ["tower", "red tower bridge"]) == pytest.approx(
        2 * (2 / 3) * (2 / 3) / (4 / 3)
    )
    assert best_f1("tower tower", ["tower"]) == pytest.approx(2 * 0.5 * 1 / 1.5)  # a word counts as often as in both
    assert best_f1("", ["tower"]) == best_exact_match("", ["tower"]) == 0
    scores = compute(("squad",), ["the Tower.", "tall tower"], [["bridge", "Tower"], ["tower"]])
    assert scores == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 * 0.5 / 1.5) / 2)}


def test_rouge() -> None:
    # Stemmed: the cat sat / the cat sit down. Unigrams: 2 of 3 and 2 of 4 (sat and sit differ); bigrams: 1 of 2 and 1 of 3.
    scores = compute(("rouge",), ["The cats sat."], ["the cat sits down"])
    assert set(scores) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert scores["rouge1"] == pytest.approx(2 * 2 / (3 + 4))
    assert scores["rouge2"] == pytest.approx(2 * 1 / (2 + 3))
    assert scores["rougeL"] == scores["rougeLsum"] == pytest.approx(2 * 2 / (3 + 4))


def test_rouge_lsum_compares_sentence_by_sentence() -> None:
    """The sentences in the other order: the longest common subsequence of the whole holds one, that of sentences both."""
    scores = compute(("rouge",), ["It rains today. Anna sings loud."], ["Anna sings loud. It rains today."])
    assert scores["rouge1"] == scores["rougeLsum"] == 1
    assert scores["rougeL"] == pytest.approx(0.5)


def test_rouge_is_the_mean_over_rows() -> None:
    assert compute(("rouge",), ["cat", "dog"], ["cat", "bird"])["rouge1"] == 0.5
    assert compute(("rouge",), [""], ["cat"])["rouge1"] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Smith left. He paid 3.50 dollars!", ["Mr. Smith left.", "He paid 3.50 dollars!"]),
        ("The U.S. economy grew. Why?", ["The U.S. economy grew.", "Why?"]),
        ("No full stop\nA second line .", ["No full stop", "A second line ."]),
        ('"Go." She went.', ['"Go."', "She went."]),
        ("  \n\n ", []),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected
