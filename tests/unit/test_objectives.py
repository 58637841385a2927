"""Learning tasks: losses and scores checked by hand, and sums that do not depend on the order in which they are added."""

import json
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from fedloom.errors import DataError
from fedloom.objectives import (
    NO_TARGET,
    UNIT,
    Classification,
    Language,
    MultiLabel,
    Objective,
    Regression,
    Score,
    from_content,
    sum_scores,
)

YEARS = Regression(names=("years",), mean=(10.0,), std=(2.0,))
TWO = Regression(names=("a", "b"), mean=(0.0, 1.0), std=(1.0, 3.0), loss_name="huber", delta=0.5)
TASKS: dict[str, Objective] = {
    "classification": Classification.numbered(3),
    "multilabel": MultiLabel(names=("cat", "dog")),
    "regression": YEARS,
    "two targets": TWO,
    "language": Language(vocabulary=5),
}


def examples(objective: Objective, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of `n` examples."""
    random = torch.Generator().manual_seed(seed)
    width = objective.n_outputs
    if isinstance(objective, Language):
        targets = torch.randint(width, (n, 4), generator=random)
        targets[torch.rand((n, 4), generator=random) < 0.3] = NO_TARGET
        return torch.randn(n, 4, width, generator=random), targets
    outputs = torch.randn(n, width, generator=random)
    if isinstance(objective, Classification):
        return outputs, torch.randint(width, (n,), generator=random)
    if isinstance(objective, MultiLabel):
        return outputs, torch.randint(2, (n, width), generator=random, dtype=torch.uint8)
    return outputs, torch.randn(n, width, generator=random)


def test_a_classification_counts_right_answers_by_class():
    outputs = torch.tensor([[2.0, 1, 0], [0, 2, 1], [0, 2, 1], [math.nan, 0, 0]])
    score = TASKS["classification"].scores(outputs, torch.tensor([0, 1, 0, 0]), [4])[0]
    assert score["right"].tolist() == [1, 1, 0]
    assert score["rows"].tolist() == [3, 1, 0]
    assert TASKS["classification"].metrics(score) == {"accuracy": 0.5}
    name, recalls = TASKS["classification"].by_name(score)
    assert (name, recalls[:2], math.isnan(recalls[2])) == ("recall", [1 / 3, 1.0], True)


def test_labels_are_counted_one_by_one_and_all_labels_of_a_bad_output_are_wrong():
    outputs = torch.tensor([[1.0, -1], [2, 3], [-1, -1], [math.inf, -1]])
    targets = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 0]], dtype=torch.uint8)
    score = TASKS["multilabel"].scores(outputs, targets, [4])[0]
    assert score["tp"].tolist() == [2, 0]
    assert score["fp"].tolist() == [0, 2]  # the dog of the second example, and that of the bad output
    assert score["fn"].tolist() == [1, 1]
    assert (score["exact"].item(), score["rows"].item()) == (1, 4)
    found = TASKS["multilabel"].metrics(score)
    assert found == {"micro_f1": 4 / 8, "macro_f1": (4 / 5 + 0) / 2, "exact_match": 1 / 4}
    assert TASKS["multilabel"].by_name(score) == ("f1", [4 / 5, 0.0])


def test_a_model_that_finds_no_label_where_there_is_none_is_right():
    nothing = torch.zeros(2, 2, dtype=torch.uint8)
    found = TASKS["multilabel"].metrics(TASKS["multilabel"].scores(nothing - 1.0, nothing, [2])[0])
    assert (found["micro_f1"], found["exact_match"], math.isnan(found["macro_f1"])) == (1.0, 1.0, True)


def test_errors_are_in_the_targets_units():
    outputs, targets = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [1.0], [-1.0]])
    score = YEARS.scores(outputs, targets, [3])[0]
    assert (score["se"] / UNIT).tolist() == [10.0]
    assert (score["ae"] / UNIT).tolist() == [4.0]
    found = YEARS.metrics(score)
    assert found["rmse"] == pytest.approx(2 * math.sqrt(10 / 3))  # two years per standard deviation
    assert found["mae"] == pytest.approx(2 * 4 / 3)
    mean = 1 / 3
    assert found["r2"] == pytest.approx(1 - 10 / (2 * (1 - mean) ** 2 + (-1 - mean) ** 2))
    assert YEARS.answer(outputs).tolist() == [10.0, 12.0, 14.0]


def test_several_targets_are_scored_in_standard_deviations():
    score = TWO.scores(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]), [1])[0]
    assert TWO.metrics(score)["rmse"] == pytest.approx(math.sqrt(5 / 2))
    assert TWO.metric.unit == "standard deviations"
    assert TWO.answer(torch.tensor([[1.0, 2.0]])).tolist() == [[1.0, 7.0]]


def test_an_output_that_is_not_finite_leaves_no_error():
    score = YEARS.scores(torch.tensor([[math.nan], [0.0]]), torch.zeros(2, 1), [2])[0]
    assert score["bad"].tolist() == [1]
    assert all(math.isnan(value) for value in YEARS.metrics(score).values())


def test_targets_without_variance_have_no_r2():
    assert math.isnan(YEARS.metrics(YEARS.scores(torch.ones(3, 1), torch.ones(3, 1), [3])[0])["r2"])


def test_tokens_without_a_target_do_not_count():
    task = TASKS["language"]
    outputs = torch.full((2, 2, 5), 0.0)
    outputs[0, 0, 3] = 50.0
    targets = torch.tensor([[3, NO_TARGET], [NO_TARGET, 1]])
    score = task.scores(outputs, targets, [2])[0]
    assert {name: values.item() for name, values in score.sums.items() if name != "nll"} == {
        "right": 1, "tokens": 2, "rows": 2,
    }  # fmt: skip
    assert task.metrics(score)["perplexity"] == pytest.approx(math.sqrt(5), rel=1e-6)
    assert float(task.loss(outputs, targets)) == pytest.approx(math.log(5) / 2, rel=1e-6)
    assert float(task.loss(outputs, torch.full_like(targets, NO_TARGET))) == 0.0


def test_a_bad_logit_makes_its_token_wrong_and_the_perplexity_large():
    task, outputs = TASKS["language"], torch.zeros(1, 1, 5)
    outputs[0, 0, 2] = math.nan
    score = task.scores(outputs, torch.tensor([[2]]), [1])[0]
    assert score["right"].item() == 0
    assert task.metrics(score)["perplexity"] > 1e6


@pytest.mark.parametrize("name", TASKS)
def test_sums_are_equal_bit_for_bit_in_any_order(name):
    objective = TASKS[name]
    outputs, targets = examples(objective, 60)
    whole = objective.scores(outputs, targets, [60])[0]
    for seed in range(5):
        sizes = [1, 7, 0, 20, 2, 30]
        parts = objective.scores(outputs, targets, sizes)
        assert [part.n_rows for part in parts] == sizes
        random.Random(seed).shuffle(parts)
        assert sum_scores([objective.none(), *parts]) == whole
    assert {key: len(values) for key, values in whole.sums.items()} == objective.shapes()
    assert all(values.dtype == np.int64 for values in whole.sums.values())


@pytest.mark.parametrize("name", TASKS)
def test_losses_are_the_same_under_vmap_and_have_gradients(name):
    objective = TASKS[name]
    outputs, targets = examples(objective, 6)
    stacked, wanted = outputs.view(2, 3, *outputs.shape[1:]), targets.view(2, 3, *targets.shape[1:])
    mapped = torch.func.vmap(objective.loss)(stacked, wanted)
    alone = torch.stack([objective.loss(a, b) for a, b in zip(stacked, wanted, strict=True)])
    torch.testing.assert_close(mapped, alone, rtol=0, atol=2.4e-7)
    assert torch.func.grad(lambda out: objective.loss(out, targets))(outputs).abs().sum() > 0


@pytest.mark.parametrize("name", TASKS)
def test_an_objective_survives_json(name):
    assert from_content(json.loads(json.dumps(TASKS[name].content()))) == TASKS[name]


@pytest.mark.parametrize("content", [{}, {"task": "clustering"}, {"task": "language"}, {"task": "regression", "x": 1}])
def test_a_malformed_description_is_refused(content):
    with pytest.raises(DataError, match="malformed learning task"):
        from_content(content)


@pytest.mark.parametrize("name", TASKS)
def test_no_examples_have_no_value(name):
    assert all(math.isnan(value) for value in TASKS[name].metrics(TASKS[name].none()).values())


def test_the_huber_loss_is_linear_beyond_its_threshold():
    loss = TWO.loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.2]]))
    assert float(loss) == pytest.approx((0.5 * (3 - 0.25) + 0.02) / 2)


def test_strata_are_classes_rarest_labels_and_quantile_bins():
    assert TASKS["language"].strata(torch.zeros(2, 3), 2) is None
    labels = torch.tensor([[1, 0], [1, 1], [1, 0], [0, 0], [0, 1]])
    found = TASKS["multilabel"].strata(labels, 4)  # among the first four, dogs are rarer
    assert found.of.tolist() == [0, 1, 0, 2, 1]
    assert found.names == ("cat", "dog", "(no label)")
    bins = YEARS.strata(torch.arange(-2.0, 3.0)[:, None], 5, bins=2)
    assert bins.of.tolist() == [0, 0, 1, 1, 1]
    assert bins.names == ("below 10", "10 or more")
    equal = YEARS.strata(torch.tensor([[0.0]] * 9 + [[1.0]]), 10)  # equal edges are merged
    assert equal.of.tolist() == [0] * 9 + [1]
    assert YEARS.strata(torch.zeros(4, 1), 4).names == ("all",)


def claim(objective: Objective, **changed: list[int]) -> Score:
    outputs, targets = examples(objective, 10)
    honest = objective.scores(outputs, targets, [10])[0]
    return Score({**honest.sums, **{name: np.array(values, np.int64) for name, values in changed.items()}})


def test_claims_beyond_a_clients_examples_are_recognised():
    for objective in TASKS.values():
        most = claim(objective)
        assert objective.excess(most, most) == ""
        more = Score({**most.sums, "rows": most["rows"] + 1})
        assert "more examples" in objective.excess(more, most)
    most = claim(TASKS["classification"])
    wrong = Score({**most.sums, "right": most["rows"] + 1})
    assert "more correct predictions" in TASKS["classification"].excess(wrong, most)
    assert "more correct predictions than tokens" in TASKS["language"].excess(
        claim(TASKS["language"], right=[99]), claim(TASKS["language"])
    )
    assert "negative" in YEARS.excess(claim(YEARS, se=[-1]), claim(YEARS))
    assert "more predictions" in TASKS["multilabel"].excess(
        claim(TASKS["multilabel"], tp=[11, 0]), claim(TASKS["multilabel"])
    )
