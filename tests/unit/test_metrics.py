"""Metrics: their definitions, checked by hand."""

import math

import numpy as np
import pytest
import torch

from fedloom.engines import Reply
from fedloom.experiment import metrics
from fedloom.objectives import Classification, Metric, Regression, Score, sum_scores

CLASSES, ACCURACY = Classification.numbered(2), Classification.primary


def score(right: int, rows: int) -> Score:
    return Score({"right": np.array([right, 0]), "rows": np.array([rows, 0])})


THREE = [score(9, 10), score(1, 2), score(0, 4)]


def test_an_accuracy_is_correct_over_all_examples():
    assert CLASSES.value(Score({"right": np.array([1, 2]), "rows": np.array([4, 2])})) == 0.5
    assert math.isnan(CLASSES.value(score(0, 0)))
    assert CLASSES.value(sum_scores(THREE)) == 10 / 16


def test_the_spread_over_clients():
    row = metrics.spread(CLASSES, THREE, "own", [True, True, False])
    each = [0.9, 0.5, 0.0]
    assert row["own_accuracy"] == 10 / 16  # over examples
    assert row["own_accuracy_uniform"] == pytest.approx(1.4 / 3)  # over clients
    assert row["own_accuracy_std"] == pytest.approx(np.std(each))
    assert row["own_accuracy_worst10"] == 0.0
    assert row["own_accuracy_trained"] == 10 / 12


def test_the_worst_tenth_is_rounded_up():
    scores = [score(n, 20) for n in range(20)]
    assert metrics.spread(CLASSES, scores, "own")["own_accuracy_worst10"] == pytest.approx((0 + 1 / 20) / 2)
    assert metrics.spread(CLASSES, [*scores, score(20, 20)], "own")["own_accuracy_worst10"] == pytest.approx(
        (0 + 1 + 2) / 60
    )


def test_clients_without_examples_do_not_count():
    row = metrics.spread(CLASSES, [score(1, 2), score(0, 0)], "own", [False, True])
    assert (row["own_accuracy"], row["own_accuracy_uniform"], row["own_accuracy_std"], row["own_accuracy_trained"]) == (
        0.5,
        0.5,
        0.0,
        None,
    )
    assert metrics.spread(CLASSES, [score(0, 0)], "own") == {}


def test_without_trained_clients_there_is_no_trained_accuracy():
    assert "own_accuracy_trained" not in metrics.spread(CLASSES, THREE, "own", [False, False, False])


def test_general_accuracy_is_the_mean_over_clients():
    assert metrics.over_clients(CLASSES, THREE, "general")["general_accuracy"] == pytest.approx(1.4 / 3)


def test_without_common_examples_there_is_no_general_accuracy():
    assert metrics.over_clients(CLASSES, [score(0, 0)] * 2, "general") == {
        "general_accuracy": None,
        "general_accuracy_std": None,
    }


def test_logs_are_weighted_by_the_examples_of_those_who_wrote_them():
    def reply(examples, logs):
        return Reply(client=0, slot=0, uplink={}, examples=examples, steps={}, logs=logs, seconds=0.0)

    row = metrics.mean_logs([reply(10, {"a": 1.0}), reply(30, {"a": 2.0, "b": 5.0})])
    assert row == {"a": 1.75, "b": 5.0}
    assert metrics.mean_logs([]) == {}


def series(values, valid=None):
    rows = [{"round": 2 * i + 2, "personal_accuracy": v, "general_accuracy": None} for i, v in enumerate(values)]
    for row, v in zip(rows, valid or [], strict=False):
        row["valid_accuracy"] = v
    return rows


def test_the_summary_of_a_series():
    values = [0.9, *(i / 100 for i in range(11))]
    found = metrics.summarise(series(values), ACCURACY)["personal_accuracy"]
    assert found["final"] == 0.10
    assert found["last10"] == pytest.approx(sum(range(1, 11)) / 1000)
    assert found["best_on_test"] == 0.9
    assert (found["chosen_on_validation"], found["chosen_round"]) == (None, None)


def test_the_round_is_chosen_on_validation_and_the_first_of_equals():
    found = metrics.summarise(series([0.1, 0.2, 0.3, 0.4], [0.5, 0.7, 0.7, 0.6]), ACCURACY)["personal_accuracy"]
    assert (found["chosen_on_validation"], found["chosen_round"]) == (0.2, 4)


def test_missing_scores_are_none_and_facets_are_of_the_last_row():
    rows = series([0.1, 0.2])
    rows[0]["general_accuracy"] = 0.7
    rows[-1] |= {"personal_accuracy_std": 0.05, "personal_accuracy_worst10": 0.01}
    found = metrics.summarise(rows, ACCURACY)
    assert found["server_accuracy"] is None
    assert found["general_accuracy"]["final"] == 0.7  # the latest round in which it was scored
    assert found["personal_accuracy"]["std"] == 0.05
    assert found["personal_accuracy"]["worst10"] == 0.01


def test_a_run_without_metrics_has_no_accuracies():
    assert set(metrics.summarise([], ACCURACY).values()) == {None}


def test_recall_is_correct_over_all_examples_of_a_class():
    pairs = (([1, 0, 0], [3, 0, 2]), ([1, 0, 1], [1, 0, 1]))
    scores = [Score({"right": np.array(right), "rows": np.array(rows)}) for right, rows in pairs]
    found = metrics.by_name(Classification.numbered(3), scores, "general")
    assert found == {"general_recall": [0.5, None, 0.3333]}


def test_the_recalls_of_a_summary_are_those_of_the_last_row():
    rows = [{"round": 1, "personal_recall": [0.1], "server_recall": [0.2]}, {"round": 2, "personal_recall": [0.3]}]
    found = metrics.summarise(rows, ACCURACY)
    assert found["personal_recall"] == [0.3]
    assert "server_recall" not in found


def test_the_first_round_that_reaches_the_target_counts():
    bytes_so_far = [{"uplink_bytes": 10 * n, "downlink_bytes": n} for n in range(1, 5)]
    rows = [row | more for row, more in zip(series([0.1, 0.5, 0.4, 0.6]), bytes_so_far, strict=True)]
    found = metrics.cost_to_target(rows, 0.5, ACCURACY)
    assert found == {"target": 0.5, "rounds_to_target": rows[1]["round"], "bytes_to_target": 22}
    assert metrics.cost_to_target(rows, 0.9, ACCURACY) == {
        "target": 0.9,
        "rounds_to_target": None,
        "bytes_to_target": None,
    }
    assert metrics.cost_to_target(rows, None, ACCURACY) == {}


RMSE = Metric("rmse", "lower")


def test_the_best_of_errors_is_the_smallest_and_the_worst_tenth_the_largest():
    values = [3.0, 1.0, 2.0]
    rows = [{"round": i, "personal_rmse": v, "valid_rmse": 5 - v} for i, v in enumerate(values, start=1)]
    found = metrics.summarise(rows, RMSE)["personal_rmse"]
    assert (found["best_on_test"], found["chosen_on_validation"], found["chosen_round"]) == (1.0, 3.0, 1)
    bytes_so_far = {"uplink_bytes": 1, "downlink_bytes": 2}
    reached = metrics.cost_to_target([row | bytes_so_far for row in rows], 1.5, RMSE)
    assert reached["rounds_to_target"] == 2
    years = Regression(names=("years",), mean=(0.0,), std=(2.0,))

    def error(e: float) -> Score:
        return years.scores(torch.tensor([[e]]), torch.tensor([[0.0]]), [1])[0]

    row = metrics.spread(years, [error(e) for e in (1.0, 3.0, 2.0)], "personal")
    assert row["personal_rmse_worst10"] == 6.0  # in years: two per standard deviation
    assert row["personal_rmse"] == pytest.approx(2 * math.sqrt(14 / 3))
    assert row["personal_mae"] == 4.0
