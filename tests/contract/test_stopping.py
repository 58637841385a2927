"""Early stopping on the validation score: the round, the summary, and resuming."""

import pytest

from contract import assert_same, left_by, untimed
from fedloom import tree
from fedloom.config.settings import StopSettings
from fedloom.errors import ConfigError, RunFolderError
from fedloom.experiment.loop import Experiment
from fedloom.experiment.manifest import read_manifest
from fedloom.experiment.stopping import reason_to_stop, stopped_in_words
from fedloom.experiment.verifying import verify
from fedloom.objectives import Metric
from small import interrupted_after

ACCURACY = Metric("accuracy", "higher", True, "")
ERROR = Metric("rmse", "lower", False, "")
RUN = {"clients": 3, "rounds": 12, "data.rows": 160, "eval.valid": 0.3, "checkpoint_every": 2, "method.lr": 0.6}
STOP = {"stop.patience": 2}


def reason(values, patience, metric=ACCURACY, after=0, every=1):
    rows = [{"round": every * (place + 1), f"valid_{metric.name}": value} for place, value in enumerate(values)]
    return reason_to_stop(rows, StopSettings(patience=patience, after=after), metric)


def test_patience_counts_rounds_since_the_first_best_value():
    found = reason([0.5, 0.7, 0.7, 0.6], 2)
    assert found == {"round": 4, "measure": "valid_accuracy", "best": 0.7, "best_round": 2, "patience": 2}
    assert reason([0.5, 0.7, 0.7], 2) is None
    assert reason([0.5, 0.7, 0.7, 0.8], 2) is None
    assert reason([3.0, 2.0, 2.5, 2.5], 2, ERROR)["best_round"] == 2
    assert reason([0.7, 0.6], 4, every=5)["round"] == 10  # one scored round, but five rounds
    assert reason([0.7, 0.6, 0.6, 0.6], 2, after=3) is None
    later = reason([0.7, 0.6, 0.6, 0.6, 0.6], 2, after=3)
    assert stopped_in_words(later, 9) == (
        "stopped after round 5 of 9: valid_accuracy has not improved since round 1 (stop.patience=2, stop.after=3)"
    )
    assert reason([], 1) is reason([0.1, 0.1], None) is None


def test_a_score_that_is_undefined_is_no_improvement():
    assert reason([0.7, None, None], 2)["best"] == 0.7
    found = reason([None, None], 2)
    assert (found["best"], found["best_round"]) == (None, None)
    assert stopped_in_words(found, 9) == "stopped after round 2 of 9: valid_accuracy is undefined (stop.patience=2)"


@pytest.mark.parametrize("engine", ["vectorised", "processes"])
def test_a_run_stops_in_the_same_round_on_every_engine(experiment, engine):
    wanted = left_by(experiment("fedper", **RUN, **STOP))
    stopped, series = wanted.summary["stopped_early"], [row["valid_accuracy"] for row in wanted.rows]
    assert len(series) == stopped["round"] == wanted.summary["rounds"] < 12
    assert stopped["best"] == max(series) == series[stopped["best_round"] - 1]
    assert stopped["round"] == series.index(max(series)) + 1 + 2
    assert wanted.rows[-1]["general_accuracy"] is not None  # with the scores of a last round
    found = left_by(experiment("fedper", **RUN, **STOP, engine=engine))
    assert found.summary["stopped_early"]["round"] == stopped["round"]
    if engine == "processes":
        assert_same(found, wanted)


def test_a_run_that_stops_has_a_final_exchange(experiment):
    """The calibrated head has a better score than the previous head."""
    quick = {"method.calibration_epochs": 1, "method.virtual_features": 10, "width": 8}
    run = experiment("ccvr", **RUN, **STOP, **quick)
    summary = run.run()
    assert summary["stopped_early"]["round"] == summary["rounds"] < 12
    assert "covariances" in str(summary["bytes_by_kind"]["uplink"])
    with pytest.raises(ConfigError, match="rounds=12: CCVR has had its final exchange"):
        Experiment.resume(run.folder.path, rounds=12)


def test_an_interrupted_run_stops_in_the_same_round(experiment):
    whole = left_by(experiment("fedper", **RUN, **STOP))
    last = whole.summary["rounds"]
    for place in (last - 1, last):  # before the stop, and between the stop and the summary
        path = interrupted_after(experiment("fedper", **RUN, **STOP), place)
        assert_same(left_by(Experiment.resume(path)), whole)
    assert not verify(path).problems


def test_a_stopped_run_can_go_on(experiment):
    whole = experiment("fedper", **RUN)
    whole.run()
    run = experiment("fedper", **{**RUN, "checkpoint_every": 1}, **STOP)
    last = run.run()["rounds"]
    path = run.folder.path
    with pytest.raises(RunFolderError, match="this run is finished"):
        Experiment.resume(path)
    with pytest.raises(ConfigError, match=rf"rounds={last}: .* has {last} rounds already"):
        Experiment.resume(path, rounds=last)
    longer = Experiment.resume(path, rounds=12)
    interrupted_after(longer, last + 1)
    record = read_manifest(path / "checkpoint" / "manifest.json")
    assert record["resumed"][-1]["noted"] == [f"rounds=12 (it stopped early after {last})"]
    longer = Experiment.resume(path)
    summary = longer.run()
    assert summary["rounds"] > last + 1
    done = summary["rounds"]
    same = [key for key in whole.rows[done - 1] if "valid" in key or "personal" in key]
    assert [longer.rows[-1][key] for key in same] == [whole.rows[done - 1][key] for key in same]
    assert not verify(path).problems


def test_without_a_stop_a_run_is_as_without_the_setting(experiment):
    wanted = experiment("fedavg", **{**RUN, "rounds": 3})
    found = experiment("fedavg", **{**RUN, "rounds": 3}, **{"stop.patience": 3})
    assert untimed(found.run()) == untimed(wanted.run())
    assert tree.equal(found.server, wanted.server)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop.patience": 2}, "stop.patience=2: needs validation examples; set eval.valid"),
        ({"stop.patience": 0, "eval.valid": 0.2}, "stop.patience=0: must be at least 1"),
        ({"stop.after": 2}, "stop.after=2: has no effect without stop.patience"),
        ({"stop.patience": 2, "eval.valid": 0.2, "privacy.noise": 1.0}, "would depend on scores without noise"),
    ],
)
def test_settings_that_are_refused(experiment, settings, message):
    with pytest.raises(ConfigError, match=message):
        experiment("fedavg", **settings)
