"""pFedMe on a network: predictions start from the received model, and running statistics are those of the personal model."""

import pytest
import torch

from fedloom import PFedMe
from small import spied


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


TINY = {"clients": 3, "rounds": 2, "data.rows": 90}
SHORT = {"local_steps": 2, "inner_steps": 2}


def test_the_personal_model_restarts_from_the_received_one_and_sends_its_running_statistics(experiment):
    run = experiment(PFedMe(**SHORT), model="resnet8", **{**TINY, "rounds": 1})
    rounds = spied(run)
    run.run()
    kept, sent = run.engine.client(0).weights, rounds[-1].replies[0].uplink["weights"]
    for name, value in sent["buffers"].items():
        assert torch.equal(value, kept["buffers"][name.replace("model.", "personal.", 1)])
    down = run.hooks.deploy(run.server, 1)
    _, client, _ = run.engine.personal(1, down, 0, adapt=False)
    for part in client.weights.values():
        for name in [name for name in part if name.startswith("model.")]:
            assert torch.equal(part[name], part[name.replace("model.", "personal.", 1)])


def test_clients_that_have_not_trained_predict_with_a_fitted_model(experiment):
    """The adaptation reduces the loss on the client's own examples."""
    run = experiment(
        PFedMe(personal_lr=0.05, mu=1.0, local_steps=5), rounds=1, cohort=1, **{"clients": 3, "data.rows": 90}
    )
    run.run()
    down = run.hooks.deploy(run.server, 1)
    for i in range(3):
        x, y = run.data.train(i)
        before, after = (run.engine.personal(1, down, i, adapt=adapt) for adapt in (False, True))
        model, losses = run.problem.modules(0)["personal"], []
        for _, client, _ in (before, after):
            state = {
                n.removeprefix("personal."): p for n, p in client.weights["params"].items() if n.startswith("personal.")
            }
            losses.append(float(torch.nn.functional.cross_entropy(torch.func.functional_call(model, state, (x,)), y)))
        assert losses[1] < losses[0] - 0.01


def test_epochs_without_effect_are_refused():
    with pytest.raises(ValueError, match="local_epochs=2: has no effect with local_steps=20; set local_steps=0"):
        PFedMe(local_epochs=2)
    (phase,) = PFedMe(local_epochs=2, local_steps=0).phases()
    assert (phase.epochs, phase.steps) == (2, None)
