"""Flower's simulation (on Ray): FedAvg with a NumPyClient, with one core per client.

pip install 'flwr[simulation]>=1.15'
python benchmarks/peers/flower.py w4-mlp --scale 0.1

The simulation hangs if /tmp/ray/ray_current_cluster names a cluster that no longer exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from federation import need, options, problem_of, tell
from torch import nn

from fedloom.engines import Problem


def main() -> None:
    """Run the peer and report its times."""
    given = options("Flower", ["w1", "w1-100", "w4", "w4-mlp"])
    hint = "pip install 'flwr[simulation]>=1.15'"
    client, server, simulation = (need(f"flwr.{part}", hint) for part in ("client", "server", "simulation"))
    common, strategy = need("flwr.common", hint), need("flwr.server.strategy", hint)
    problem = problem_of(given.workload, given.scale)
    task, stamps = problem.task, list[float]()

    def stamp(*_: Any) -> None:
        stamps.append(time.perf_counter())  # called once before the first round and after every round

    first = [p.numpy() for p in problem.modules(0)["model"].state_dict().values()]
    fedavg = strategy.FedAvg(
        fraction_fit=task.max_cohort / task.n_clients,
        fraction_evaluate=0.0,
        min_fit_clients=task.max_cohort,
        min_available_clients=task.n_clients,
        initial_parameters=common.ndarrays_to_parameters(first),
        evaluate_fn=stamp,
        accept_failures=False,
    )
    parts = server.ServerAppComponents(strategy=fedavg, config=server.ServerConfig(num_rounds=given.rounds + 1))
    simulation.run_simulation(
        server_app=server.ServerApp(server_fn=lambda _: parts),
        client_app=client.ClientApp(client_fn=client_maker(client.NumPyClient, given.workload, given.scale)),
        num_supernodes=task.n_clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    tell("Flower", given, [after - before for before, after in pairwise(stamps)], "training alone")


def client_maker(base: type, workload: str, scale: float) -> Callable[[Any], Any]:
    """Return a client_fn. A worker process creates its own federation from the names."""

    class Client(base):  # type: ignore[misc, valid-type]
        def __init__(self, i: int) -> None:
            self.i = i

        def fit(self, parameters: list[Any], config: Any) -> tuple[list[Any], int, dict[str, Any]]:
            torch.set_num_threads(1)
            problem = problem_of(workload, scale)
            model = problem.modules(0)["model"].requires_grad_(True)
            names = model.state_dict().keys()
            model.load_state_dict({k: torch.tensor(v) for k, v in zip(names, parameters, strict=True)})
            n = train(problem, self.i, model)
            return [p.detach().numpy() for p in model.state_dict().values()], n, {}

    return lambda context: Client(int(context.node_config["partition-id"])).to_client()


def train(problem: Problem, i: int, model: nn.Module) -> int:
    """Train one epoch in a plain loop over tensors, as in Flower's examples, and return the client's number of examples."""
    x, y = problem.data.train(i)
    size = min(problem.plan.batch_size, len(y))
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.method.lr)
    for index in torch.randperm(len(y)).split(size):
        if len(index) < size and problem.plan.drop_last:
            continue
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return len(y)


if __name__ == "__main__":
    main()
