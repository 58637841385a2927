"""Settings of runs in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import pytest
from synthetic_runs import Scene

from fedloom.report import RunRecord, read
from fedloom.report.facts import local_training, partition_words, settings_in_words
from fedloom.report.groups import group


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    (found,) = read([Scene(rounds=2, clients=3).write(tmp_path_factory.mktemp("facts") / "run")])
    return found


def with_config(record: RunRecord, **values: Any) -> RunRecord:
    return dataclasses.replace(record, config={**record.config, **values})


def with_scheme(record: RunRecord, **values: Any) -> RunRecord:
    return dataclasses.replace(record, partition={**record.partition, "scheme": values})


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({"name": "iid"}, "IID"),
        ({"name": "dirichlet", "alpha": 0.1, "min_examples": 10}, "Dirichlet over classes, alpha 0.1"),
        ({"name": "dirichlet", "alpha": 1.0, "by": "domain"}, "Dirichlet over domain, alpha 1.0"),
        ({"name": "pathological", "classes_per_client": 2, "balance": True}, "2 classes per client, equal shares"),
        ({"name": "quantity", "alpha": 0.5}, "sizes by Dirichlet, alpha 0.5"),
        ({"name": "natural", "column": "writer"}, "by owner (column writer)"),
        ({"name": "of another version", "alpha": 3}, "of another version alpha=3"),
        ({"name": "dirichlet"}, "dirichlet"),
    ],
)
def test_a_partition_in_words(record: RunRecord, scheme: dict[str, Any], words: str) -> None:
    assert partition_words(with_scheme(record, **scheme)) == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"participation": 1.0}, "20, all in every round"),
        ({"participation": 0.25}, "20, 25 % in a round"),
        ({"participation": "0.1-0.5"}, "20, a fraction of 0.1-0.5 in a round"),
        ({"participation": 1.0, "cohort": 5}, "20, 5 in a round"),
        ({}, "20"),
    ],
)
def test_the_clients_of_a_round_in_words(record: RunRecord, settings: dict[str, Any], words: str) -> None:
    assert settings_in_words([with_config(record, clients=20, **settings)])["clients"] == words


def test_facts_name_examples_and_what_is_held_out(record: RunRecord) -> None:
    found = settings_in_words([with_scheme(record, name="iid", n_rows=1797, test_fraction=0.25, valid=0.1)])
    assert found["data"] == "digits (1,797 examples)"
    assert found["held out per client"] == "25 % for testing, 10 % for validation"
    assert "runs" not in found


def test_local_training_names_rate_optimiser_and_steps(record: RunRecord) -> None:
    turns = pd.DataFrame({"round": [1, 1], "client": [0, 1], "steps": [10, 15]})
    one = dataclasses.replace(
        with_config(
            record, method={"name": "fedavg", "lr": 0.1, "optimizer": "sgd", "momentum": 0.5, "local_epochs": 2}
        ),
        clients=turns,
    )
    other = with_config(record, method={"name": "fedrir", "lr": 0.001, "optimizer": "adam", "local_epochs": 1})
    first = "SGD, lr 0.1, momentum 0.5, 2 epochs, 12.5 steps per client and round"
    assert local_training(group([one])) == f"Local training: {first}."
    assert local_training(group([one, other])) == f"Local training: {first} (fedavg); Adam, lr 0.001, 1 epoch (fedrir)."
    assert local_training(group([with_config(record, method="mine")])) == ""
    known = {**record.partition, "hyper_parameters": {"lr": 0.1, "optimizer": "sgd", "local_epochs": 2}}
    short = dataclasses.replace(with_config(record, method={"name": "fedavg", "lr": 1}), clients=None, partition=known)
    assert local_training(group([short])) == "Local training: SGD, lr 1, 2 epochs."
