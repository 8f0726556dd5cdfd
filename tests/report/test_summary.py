"""Rows over seeds: mean, spread, interval, paired differences, and which runs are one row."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import found
from scipy import stats

from loftq_exp.errors import UserError
from loftq_exp.report.collect import Found
from loftq_exp.report.summary import Score, score, summarise

VALUES = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.lists(VALUES, min_size=2, max_size=8))
def test_a_score_is_what_numpy_and_scipy_compute(values: list[float]) -> None:
    got = score(values)
    std = np.std(values, ddof=1)
    assert got.n == len(values)
    close = {"rel": 1e-9, "abs": 1e-7}
    assert got.mean == pytest.approx(np.mean(values), **close)
    assert got.std == pytest.approx(std, **close)
    if std > 1e-3:
        expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (got.low, got.high) == pytest.approx(expected, **close)


def test_one_seed_has_no_spread_and_equal_values_have_none() -> None:
    assert score([0.5]) == Score(0.5, None, 1, None, None)
    assert score([0.1, 0.1, 0.1]) == Score(0.1, 0.0, 3, 0.1, 0.1)


def test_runs_that_differ_in_their_seeds_are_one_row() -> None:
    runs = [found({"accuracy": seed / 10}, seed=seed, rank=rank) for seed in (2, 0, 1) for rank in (8, 16)]
    summary = summarise(runs)
    assert [row.name for row in summary.rows] == ["QLoRA NF4 r8", "QLoRA NF4 r16"]
    assert summary.differing == ("quant.rank",)
    assert summary.baseline is None
    for row in summary.rows:
        assert row.scores["accuracy"].n == 3
        assert row.scores["accuracy"].mean == pytest.approx(0.1)
        assert row.scores["accuracy"].std == pytest.approx(0.1)
        assert [run.metrics["config"]["seed"] for run in row.runs] == [0, 1, 2]
        assert "seed" not in row.settings
        assert row.differences == {}
    assert summary.rows[1].settings["quant.rank"] == 16
    assert summary.rows[0].measures["bits_per_weight"] == Score(4.25, 0.0, 3, 4.25, 4.25)
    assert summary.rows[0].measures["init_seconds"].mean == 2.0


def test_a_seed_that_no_run_varies_stays_a_setting() -> None:
    (row,) = summarise([found({"accuracy": 0.5}, seed=7)]).rows
    assert row.settings["seed"] == 7


def test_places_and_ways_to_run_make_no_rows() -> None:
    runs = [found({"accuracy": 0.5 + seed / 10}, seed=seed, train__logging_steps=seed + 1) for seed in (0, 1)]
    for run in runs:
        run.metrics["config"] |= {
            "output_dir": f"out{run.metrics['config']['seed']}",
            "device": "cpu",
            "report": {"baseline": "x"},
        }
    (row,) = summarise(runs).rows
    assert row.scores["accuracy"].n == 2
    assert row.settings["device"] == "cpu"
    assert not {"output_dir", "train.logging_steps"} & set(row.settings)


def test_the_calibration_seed_is_one_of_a_calibrated_run_only() -> None:
    def runs(calibration: str) -> list[Found]:
        return [
            found({"accuracy": 0.5 + seed / 100}, calibration=calibration, calibration__seed=seed) for seed in range(3)
        ]

    assert [row.scores["accuracy"].n for row in summarise(runs("full")).rows] == [3]
    assert [row.scores["accuracy"].n for row in summarise(runs("none")).rows] == [1]  # one run, found three times


def test_a_setting_that_a_record_lacks_has_the_value_before_it_existed() -> None:
    (row,) = summarise([found({"nll": 1.0}, seed=0), found({"nll": 2.0}, seed=1, levels="nf", scale="absmax")]).rows
    assert row.scores["nll"].n == 2
    assert len(summarise([found({"nll": 1.0}), found({"nll": 2.0}, levels="optimal")]).rows) == 2
    assert len(summarise([found({"nll": 1.0}), found({"nll": 2.0}, of_another_version=1)]).rows) == 2


def test_a_run_counts_once_and_one_with_scores_before_one_without(caplog: pytest.LogCaptureFixture) -> None:
    first, other = found({"nll": 1.0}), Found(Path("other.json"), found({"nll": 2.0}).metrics)
    (row,) = summarise([found({}), first, first, other]).rows
    assert row.scores["nll"] == Score(1.0, None, 1, None, None)
    assert caplog.messages == [
        "other.json: other scores than metrics.json, which has the same settings and seeds and counts"
    ]


def test_the_scores_of_an_initial_adapter_are_another_row() -> None:
    initial = found({"nll": 3.0})
    initial.metrics["scored_adapter"] = "initial"
    assert [row.name for row in summarise([found({"nll": 1.0}), initial]).rows] == [
        "QLoRA NF4 r8",
        "QLoRA NF4 r8 not fine-tuned",
    ]


def test_names_are_unique_and_say_what_differs() -> None:
    runs = [
        found({}, train__learning_rate=1e-4),
        found({}, train__learning_rate=1e-3),
        found({}, method="loftq", iter=5, train__learning_rate=1e-3),
        found({}, task__kind="glue", task__name="mnli"),
    ]
    summary = summarise(runs)
    assert [row.name for row in summary.rows] == [
        "QLoRA NF4 r8 gsm8k learning_rate=0.0001",
        "QLoRA NF4 r8 gsm8k learning_rate=0.001",
        "LoftQ NF4 iter 5 r8 gsm8k",
        "QLoRA NF4 r8 glue-mnli",
    ]
    assert summary.differing[:4] == ("task.kind", "task.name", "quant.method", "quant.iter")
    assert "train.learning_rate" in summary.differing


@given(st.lists(st.tuples(st.sampled_from(("qlora", "loftq")), st.integers(1, 2), st.sampled_from((1e-3, None)), st.integers(0, 2)),
                max_size=12))  # fmt: skip
def test_each_run_is_in_one_row_and_each_name_is_there_once(settings: list[tuple[str, int, float | None, int]]) -> None:
    runs = [found({"nll": 1.0}, method=method, rank=rank, train__weight_decay=decay, seed=seed)
            for method, rank, decay, seed in settings]  # fmt: skip
    rows = summarise(runs).rows
    assert len({row.name for row in rows}) == len(rows) == len({each[:3] for each in settings})
    assert sum(len(row.runs) for row in rows) == len({*settings})


def test_paired_differences_are_over_equal_seeds() -> None:
    ours, theirs = {0: 0.9, 1: 0.7, 2: 0.8, 4: 0.1}, {0: 0.8, 1: 0.65, 2: 0.6, 3: 0.99}
    runs = [found({"accuracy": value}, seed=seed) for seed, value in theirs.items()]
    runs += [found({"accuracy": value, "nll": 1.0}, method="loftq", iter=5, seed=seed) for seed, value in ours.items()]
    for baseline in ("qlora", "QLoRA NF4 r8"):
        summary = summarise(runs, baseline=baseline)
        assert summary.baseline == "QLoRA NF4 r8"
        reference, row = summary.rows
        assert reference.differences == {}
        difference = row.differences["accuracy"]
        pairs = [ours[seed] - theirs[seed] for seed in (0, 1, 2)]
        test = stats.ttest_rel([ours[seed] for seed in (0, 1, 2)], [theirs[seed] for seed in (0, 1, 2)])
        assert difference.n == 3
        assert difference.mean == pytest.approx(np.mean(pairs))
        assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert list(row.differences) == ["accuracy"]  # the baseline has no nll


def test_no_equal_seed_no_difference() -> None:
    runs = [found({"nll": 1.0}, seed=0), found({"nll": 2.0}, seed=1, method="pissa")]
    assert [row.differences for row in summarise(runs, baseline="qlora").rows] == [{}, {}]


def test_a_calibrated_row_pairs_with_one_that_has_no_calibration_seed() -> None:
    runs = [found({"nll": 1.0 + seed}, seed=seed) for seed in (0, 1)]
    runs += [found({"nll": 2.0 + seed + again}, seed=seed, calibration__seed=again, calibration="full", method="loftq")
             for seed in (0, 1) for again in (0, 1)]  # fmt: skip
    difference = summarise(runs, baseline="qlora").rows[1].differences["nll"]
    assert difference == Score(1.5, 0.0, 2, 1.5, 1.5)


def test_each_row_is_compared_with_the_nearest_of_several_baselines(caplog: pytest.LogCaptureFixture) -> None:
    runs = [found({"nll": rank + bits}, rank=rank, bits=bits) for rank in (8, 16) for bits in (2, 4)]
    runs += [
        found({"nll": rank + bits - 1}, rank=rank, bits=bits, method="loftq", iter=5)
        for rank in (8, 16)
        for bits in (2, 4)
    ]
    summary = summarise(runs, baseline="qlora")
    assert summary.baseline == "qlora"
    assert [row.differences["nll"].mean for row in summary.rows[4:]] == [-1.0] * 4
    assert all(not row.differences for row in summary.rows[:4])
    between = found({"nll": 1.0}, rank=12, bits=4, method="pissa")
    assert summarise([*runs, between], baseline="qlora").rows[-1].differences == {}
    assert caplog.messages == [
        "report.baseline: PiSSA NF4 r12 is equally near to QLoRA NF4 r8 and QLoRA NF4 r16; name one of these rows"
    ]
    assert summarise([*runs, between], baseline="QLoRA NF4 r8").rows[-1].differences["nll"].mean == -11.0


def test_messages_name_where_the_baseline_was_given(caplog: pytest.LogCaptureFixture) -> None:
    runs = [found({"nll": 1.0}, rank=rank) for rank in (8, 16)]
    between = found({"nll": 1.0}, rank=12, method="pissa")
    summarise(runs, baseline="qlora", option="--baseline")
    summarise([*runs, between], baseline="qlora", option="--baseline")
    assert [message.partition(":")[0] for message in caplog.messages] == ["--baseline=qlora", "--baseline"]
    with pytest.raises(UserError, match=r"^--baseline=lora: no row matches"):
        summarise(runs, baseline="lora", option="--baseline")


def test_variations_of_a_method_are_compared_with_its_published_form(caplog: pytest.LogCaptureFixture) -> None:
    """quant=loftq,calibrated report.baseline=loftq: both are the method loftq."""
    runs = [
        found({"nll": 2.0 + rank + seed}, seed=seed, rank=rank, method="loftq") for rank in (8, 16) for seed in (0, 1)
    ]
    runs += [found({"nll": 1.0 + rank + 2 * seed}, seed=seed, rank=rank, method="loftq", calibration="full", scale="search",
                   levels="optimal", calibration__seed=seed) for rank in (8, 16) for seed in (0, 1)]  # fmt: skip
    rows = summarise(runs, baseline="loftq").rows
    assert [row.differences.get("nll") for row in rows[:2]] == [None, None]
    assert [row.differences["nll"].mean for row in rows[2:]] == [-0.5, -0.5]
    assert not caplog.messages
    assert [row.differences for row in summarise(runs[:4], baseline="loftq").rows] == [{}, {}]
    assert caplog.messages == [
        "report.baseline=loftq: every row is one, so none is compared; name one row: LoftQ NF4 iter 0 r8, LoftQ NF4 iter 0 r16"
    ]


def test_scores_of_other_evaluation_data_are_not_compared() -> None:
    runs = [found({"accuracy": 0.5}), found({"accuracy": 0.9}, method="loftq", task__max_eval_samples=10)]
    assert summarise(runs, baseline="qlora").rows[1].differences == {}


def test_a_baseline_that_no_row_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"report.baseline=lora: no row matches; choose from: qlora, QLoRA NF4 r8$"):
        summarise([found({})], baseline="lora")
    with pytest.raises(UserError, match="no row matches; choose from: nothing, because there is no run"):
        summarise([], baseline="lora")


ODD = st.one_of(VALUES, st.none(), st.just(math.nan), st.just(math.inf), st.just("high"), st.booleans())


@given(st.lists(st.tuples(st.integers(0, 3), ODD, st.integers(0, 3), ODD), max_size=6))
def test_odd_scores_are_absent(values: list[tuple[int, object, int, object]]) -> None:
    runs = [run for seed, ours, other, theirs in values
            for run in (found({"nll": ours}, seed=seed, method="loftq"), found({"nll": theirs}, seed=other))]  # fmt: skip
    if not runs:
        return
    for row in summarise(runs, baseline="qlora").rows:
        for each in (*row.scores.values(), *row.differences.values()):
            assert 1 <= each.n <= 4
            assert math.isfinite(each.mean)
            assert (each.std is None) == (each.low is None) == (each.high is None) == (each.n == 1)
            if each.low is not None and each.high is not None:
                assert each.low <= each.mean <= each.high
