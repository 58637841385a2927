"""FedCross: collaborators, values that crossing preserves, and the case in which it is FedAvg with equal weights."""

import pytest
import torch

from fedloom import FedCross
from rig import Facts, params, round_of, start, uplink


def server_of(method, n):
    return start(method, 0.0, 0.0, task=Facts(max_cohort=n))


def slots(state):
    return state["slots"]["params"]["model.w"]


def test_two_models_that_take_half_of_each_other_are_fedavg_with_equal_weights():
    method = FedCross(alpha=0.5)
    after = method.aggregate(server_of(method, 2), [uplink(1.0, 3.0), uplink(5.0, -1.0)], round_of([0.9, 0.1]))
    torch.testing.assert_close(slots(after), torch.tensor([[3.0, 1.0], [3.0, 1.0]]))
    torch.testing.assert_close(params(after), torch.tensor([3.0, 1.0]))


@pytest.mark.parametrize(("number", "others"), [(0, [1, 2, 0]), (1, [2, 0, 1]), (2, [1, 2, 0])])
def test_crossing_in_order_visits_every_other_model_and_keeps_the_mean(number, others):
    method = FedCross(collaborator="in_order", alpha=0.8)
    models = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    after = method.aggregate(server_of(method, 3), [uplink(*m.tolist()) for m in models], round_of([0.2] * 3, number))
    torch.testing.assert_close(slots(after), 0.8 * models + 0.2 * models[others])
    torch.testing.assert_close(slots(after).mean(0), models.mean(0))


def test_similar_models_are_found_by_their_cosine():
    """The returned models point to 0, 10 and 90 degrees; the model in use is their mean before they are crossed."""
    angles = torch.tensor([0.0, 10.0, 90.0]).deg2rad()
    models = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [3.0], [2.0]])
    for collaborator, others in (("lowest", [2, 2, 0]), ("highest", [1, 0, 1])):
        method = FedCross(collaborator=collaborator, alpha=0.9)
        after = method.aggregate(server_of(method, 3), [uplink(*m.tolist()) for m in models], round_of([0.3] * 3))
        torch.testing.assert_close(slots(after), 0.9 * models + 0.1 * models[others])
        torch.testing.assert_close(params(after), models.mean(0))
        down = method.deploy(after, None, round_of([1.0]))
        assert down.common["weights"] is after["weights"]
        torch.testing.assert_close(
            method.downlink(after, range(3), round_of([1.0])).to(1)["weights"]["params"]["model.w"], slots(after)[1]
        )


def test_the_first_stage_averages_and_one_model_is_never_crossed():
    method = FedCross(first_stage_rounds=1)
    after = method.aggregate(server_of(method, 2), [uplink(1.0, 0.0), uplink(3.0, 0.0)], round_of([0.5, 0.5], 0))
    assert slots(after)[:, 0].tolist() == [2.0, 2.0]
    later = method.aggregate(server_of(method, 2), [uplink(1.0, 0.0), uplink(3.0, 0.0)], round_of([0.5, 0.5], 1))
    torch.testing.assert_close(slots(later)[:, 0], torch.tensor([1.02, 2.98]))
    alone = method.aggregate(server_of(method, 1), [uplink(4.0, 0.0)], round_of([1.0]))
    assert slots(alone)[:, 0].tolist() == [4.0]
    lost = method.aggregate(server_of(FedCross(alpha=1.0), 2), [uplink(4.0, 0.0)], round_of([1.0]))
    assert params(lost)[0] == 2.0  # the slot of the lost client is at 0
