"""pfl-research (Apple): FederatedAveraging with its SimulatedBackend, in one process, with the workload's exact split.

pip install 'pfl[pytorch]>=0.6'
python benchmarks/peers/pfl_research.py w4-mlp --scale 0.1
"""

from __future__ import annotations

import time
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from federation import need, options, problem_of, tell
from torch import Tensor, nn

HINT = "pip install 'pfl[pytorch]>=0.6'"


def main() -> None:
    """Run the peer and report its times."""
    given = options("pfl-research", ["w1", "w1-100", "w4", "w4-mlp"])
    algorithms = need("pfl.algorithm.federated_averaging", HINT)
    hyper, base = need("pfl.hyperparam", HINT), need("pfl.algorithm.base", HINT)
    backends, weighting = need("pfl.aggregate.simulate", HINT), need("pfl.aggregate.weighting", HINT)
    models, callbacks = need("pfl.model.pytorch", HINT), need("pfl.callback.base", HINT)
    metrics = need("pfl.metrics", HINT)
    problem = problem_of(given.workload, given.scale)
    net = with_loss(problem.modules(0)["model"].requires_grad_(True))
    backend = backends.SimulatedBackend(
        training_data=users(problem), val_data=None, postprocessors=[weighting.WeightByDatapoints()]
    )
    stamps = [time.perf_counter()]

    class Stamp(callbacks.TrainingProcessCallback):  # type: ignore[misc, name-defined]
        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            stamps.append(time.perf_counter())
            return False, metrics.Metrics()

    algorithms.FederatedAveraging().run(
        algorithm_params=base.NNAlgorithmParams(
            central_num_iterations=given.rounds + 1,
            evaluation_frequency=given.rounds + 2,  # no evaluation
            train_cohort_size=problem.task.max_cohort,
            val_cohort_size=0,
        ),
        backend=backend,
        model=models.PyTorchModel(
            model=net,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        ),
        model_train_params=hyper.NNTrainHyperParams(
            local_learning_rate=problem.method.lr,
            local_num_epochs=problem.method.local_epochs,
            local_batch_size=problem.plan.batch_size,
        ),
        model_eval_params=hyper.NNEvalHyperParams(local_batch_size=512),
        callbacks=[Stamp()],
    )
    tell("pfl-research", given, [after - before for before, after in pairwise(stamps)], "training alone")


def users(problem: Any) -> Any:
    """Return every client's examples as a federated data set."""
    federated, sampling = need("pfl.data.federated_dataset", HINT), need("pfl.data.sampling", HINT)
    rows = {i: list(problem.data.train(i)) for i in range(problem.task.n_clients)}
    sampler = sampling.get_user_sampler("minimize_reuse", list(rows))
    return federated.FederatedDataset.from_slices(rows, sampler)


def with_loss(net: nn.Module) -> nn.Module:
    """Return the net with the loss and metrics methods that pfl expects."""

    def loss(self: nn.Module, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        return nn.functional.cross_entropy(self(x), y)

    def metrics(self: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {}

    net.loss, net.metrics = MethodType(loss, net), MethodType(metrics, net)  # type: ignore[assignment]
    return net


if __name__ == "__main__":
    main()
