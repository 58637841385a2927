"""Private runs: Poisson cohorts, releases without uplinks, budgets, and equal numbers on engines and after a resume."""

import sys
from itertools import pairwise

import pytest
import torch

from contract import assert_same, left_by
from fedloom import FedAvg, tree
from fedloom.combining.budget import Releases
from fedloom.config.settings import make_settings
from fedloom.deploy.folder import deployable
from fedloom.errors import ConfigError
from fedloom.experiment.loop import Experiment
from fedloom.report import read
from fedloom.report.tables import summary_grid
from small import SMALL, changed, interrupted_after, spied

ALL = {"rounds": 2, "privacy.noise": 1.0}  # everyone in every round: the accountant is fast
CLIPS = {"privacy.clips.counts": 50.0, "privacy.clips.sums": 20.0}


def test_without_noise_and_clipping_it_is_the_mean_with_equal_weights(experiment):
    run = experiment("fedavg", rounds=1, **{"privacy.noise": 0.0, "privacy.clip": 1e6})
    seen = spied(run)
    summary = run.run()
    mean = tree.mean([reply.uplink["weights"] for reply in seen[0].replies])
    tree.map_tree(
        lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12) or a, run.server["weights"], mean
    )
    assert summary["privacy"]["epsilon"] is summary["privacy"]["epsilon_known_cohorts"] is None


@pytest.mark.parametrize(("method", "more"), [("scaffold", {"privacy.clips.control": 5.0}), ("fedproto", CLIPS)])
def test_engines_and_resumed_runs_give_the_same_numbers(experiment, method, more):
    settings = {
        **ALL,
        "checkpoint_every": 1,
        "cohort": 2,
        "privacy.adapt": 0.5,
        **more,
        "rounds": 3,
        "privacy.noise": 0.0,
    }
    whole = left_by(experiment(method, **settings))
    assert_same(whole, left_by(experiment(method, engine="bytes+sequential", **settings)))
    cut = interrupted_after(experiment(method, **settings), 1)
    resumed = Experiment.resume(cut)
    assert_same(whole, left_by(resumed))
    assert whole.summary["privacy"]["bounds"]["weights" if method == "scaffold" else "sums"] not in (1.0, 20.0)


def test_cohorts_are_poisson_samples_and_a_round_without_clients_releases_noise(experiment):
    run, states = experiment("fedavg", cohort=1, rounds=6, **{"privacy.noise": 1.0}), []
    seen = spied(run)
    before = tree.clone(run.server)
    summary = run.run(lambda *_: states.append(tree.clone(run.server)))
    arrived = [event["arrived"] for event in run.folder.rows("events.jsonl") if event["event"] == "released"]
    assert len(arrived) == 6
    assert len(set(arrived)) > 2
    assert 0 in arrived
    assert [len(turns.replies) for turns in seen] == [n for n in arrived if n]
    empty = arrived.index(0)
    moved = tree.sub(states[empty]["weights"]["params"], (states[empty - 1] if empty else before)["weights"]["params"])
    noise = torch.cat([leaf.flatten() for leaf in tree.leaves(moved)])
    assert float(noise.std()) == pytest.approx(1.0, rel=0.1)  # noise x clip / expected cohort
    facts = summary["privacy"]
    turns = [row["client"] for row in run.client_rows if row.get("uplink_bytes")]
    most = max(turns.count(i) for i in range(4))
    spent = Releases(1.0, 0.25, facts["delta"])
    assert (facts["rate"], facts["releases"], facts["delta"]) == (0.25, 6, pytest.approx(4**-1.1))
    assert facts["epsilon"] == pytest.approx(spent.epsilon(6))
    assert facts["epsilon_known_cohorts"] == pytest.approx(spent.epsilon_known(most))
    assert summary["skipped"] == 0


def test_the_noise_is_that_of_the_sum_over_the_expected_cohort_and_differs_from_round_to_round(experiment):
    """If all uplinks are clipped to almost nothing, only the noise remains."""
    run, states = experiment("fedavg", rounds=2, **{"privacy.noise": 50.0, "privacy.clip": 1e-3}), []
    states.append(tree.clone(run.server))
    run.run(lambda *_: states.append(tree.clone(run.server)))
    noises = [
        torch.cat([leaf.flatten() for leaf in tree.leaves(tree.sub(after["weights"], before["weights"]))])
        for before, after in pairwise(states)
    ]
    assert [float(noise.std()) for noise in noises] == pytest.approx([50 * 1e-3 / 4] * 2, rel=0.1)
    assert abs(float(torch.cosine_similarity(*noises, dim=0))) < 0.1


def test_a_run_ends_with_its_budget(experiment, caplog):
    spent = Releases(1.0, 1.0, 0.1)
    settings = {**ALL, "rounds": 5, "privacy.delta": 0.1, "privacy.epsilon": spent.epsilon(2) + 0.01}
    run = experiment("fedavg", **settings)
    summary = run.run()
    assert (summary["rounds"], summary["privacy"]["stopped"]) == (2, "privacy budget")
    assert summary["privacy"]["epsilon"] <= settings["privacy.epsilon"]
    assert [row["round"] for row in run.rows] == [1, 2]
    assert any("allows 2 rounds of 5" in line for line in caplog.messages)
    assert run.rows[-1]["general_accuracy"] is not None  # the last round is scored as such
    with pytest.raises(ConfigError, match=r"privacy.epsilon=0.01: privacy.noise=1 spends more in the first round"):
        experiment("fedavg", **{**settings, "privacy.epsilon": 0.01})


def test_the_noise_for_a_budget_is_in_the_config_file_and_the_report_shows_what_was_spent(experiment):
    run = experiment("fedavg", rounds=2, **{"privacy.epsilon": 3.0, "privacy.delta": 0.01})
    summary = run.run()
    assert 2.8 < summary["privacy"]["epsilon"] <= 3.0
    assert summary["privacy"]["stopped"] is None
    assert f"noise = {summary['privacy']['noise']}" in (run.folder.path / "config.toml").read_text()
    grid = summary_grid(read([run.folder.path]))
    column = next(place for place, header in enumerate(grid.headers) if "epsilon" in header)
    assert grid.rows[0][column].text == f"{summary['privacy']['epsilon']:.3g}"


def test_what_a_client_keeps_is_not_protected_from_its_own_users(experiment):
    facts = {name: experiment(name, **ALL).combination.summary()["privacy"] for name in ("fedavg", "fedper")}
    assert facts["fedavg"]["protects"] == "every model"
    assert facts["fedper"]["protects"] == "the models of others and of the server"


def test_loud_noise_few_clients_and_running_statistics_are_reported(experiment, caplog):
    experiment("fedavg", model="resnet8", **ALL).combination.announce()
    said = " ".join(caplog.messages)
    assert "a guarantee that may fail with probability 1/4 is weak for 4 clients" in said
    assert "times the norm that a client may have at most, so little can be learnt" in said
    assert "set method.buffers=private" in said
    experiment("fedproto", **ALL, **CLIPS).combination.announce()
    assert "privacy: the server's logs compare uplinks, and are left out" in caplog.messages


REFUSED = {
    "method=fedmr": "privacy.noise=1.0: fedmr uses each uplink individually",
    "method=local": "privacy.noise=1.0: local has no uplinks to add up",
    "method=centralised": "privacy.noise=1.0: centralised has no uplinks to add up",
    "aggregate=median": "privacy.noise=1.0: the result of a rule can change",
    "screen.norm=10": "privacy.noise=1.0: screening depends on the other clients",
    "screen.max_share=0.5": "privacy.noise=1.0: screening depends on the other clients",
    "devices.stragglers=late": "privacy.noise=1.0: clients in flight cannot be drawn",
    "min_clients=2": "privacy.noise=1.0: a skipped round would reveal",
    "participation=0.5-1.0": "privacy.noise=1.0: needs one probability",
    "method=fedproto": "privacy.clips: fedproto also adds up counts, sums; set the largest norm",
    "privacy.clips.control=2": "privacy.clips.control: fedavg adds up weights",
    "privacy.clips.weights=2": "privacy.clips.weights: fedavg adds up weights; the norm of weights is privacy.clip",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_would_void_the_bound_is_refused_in_one_line(experiment, word):
    key, _, value = word.partition("=")
    method = value if key == "method" else "fedavg"
    with pytest.raises(ConfigError) as caught:
        experiment(method, **{**ALL, **({} if key == "method" else {key: value})})
    assert str(caught.value).startswith(REFUSED[word])


class Choosing(FedAvg):
    """Chooses its own cohorts."""

    def cohort(self, server, task, size, round):
        return [0]


class Closing(FedAvg):
    """Has a final exchange."""

    def finish(self, server, uplinks, round):
        return server


@pytest.mark.parametrize(
    ("method", "reason"), [(Choosing(), "chooses its own cohorts"), (Closing(), "has a final exchange")]
)
def test_methods_that_see_more_than_the_sum_are_refused(experiment, method, reason):
    with pytest.raises(ConfigError, match=reason):
        experiment(method, **ALL)


def test_the_extra_is_needed_and_devices_are_refused(experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"privacy: needs dp-accounting; pip install 'fedloom\[privacy\]'"):
        experiment("fedavg", **ALL)
    with pytest.raises(ConfigError, match="privacy: cannot be deployed yet"):
        deployable(make_settings(changed(SMALL, **{"checkpoint_every": 1, "privacy.noise": 1.0})))


def test_settings_without_effect_are_refused():
    for key in ("delta", "clip", "adapt"):
        with pytest.raises(ConfigError, match=f"privacy.{key}: has no effect without privacy.noise or privacy.epsilon"):
            make_settings({"privacy": {key: 0.3}})
