"""The same method file on a deployed federation and on the sequential engine gives the same bits."""

import pytest

from fedloom import tree

pytestmark = pytest.mark.deploy


def scores(experiment):
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in experiment.rows]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fedavg"},
        {"method": "fedrir"},
        {"method": "fedmr", "cohort": 4, "rounds": 3},
        {"method": "fedvtc", "models": ["mlp", "resnet8"], "width": 16},
    ],
    ids=lambda settings: settings["method"],
)
def test_weights_and_scores_are_those_of_the_sequential_engine(running, simulated, settings):
    there, here = running.run(**settings), simulated(**settings)
    assert [line for line in there.said if not line.startswith("waiting")] == []
    assert tree.equal(there.experiment.server, here.server)
    assert scores(there.experiment) == scores(here)
    rounds = there.experiment.settings.rounds
    print(f"{settings['method']}: {there.seconds / rounds:.1f} s a round, training and scoring")
