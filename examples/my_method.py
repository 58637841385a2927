"""A custom method. `fedloom run method=examples/my_method.py:HeavyBall` runs it; `fedloom check examples/my_method.py` checks it."""

from dataclasses import dataclass

from fedloom import Method, tree


@dataclass(frozen=True)
class HeavyBall(Method):
    """FedAvg with heavy-ball momentum on the server."""

    beta: float = 0.7
    """Momentum: the fraction of the last movement that is added to the new movement."""

    def init_server(self, weights, task, round):
        server = super().init_server(weights, task, round)
        return server | {"movement": tree.zeros_like(server["weights"]["params"])}

    def aggregate(self, server, uplinks, round):
        average = tree.mean([up["weights"] for up in uplinks], round.shares)
        params = server["weights"]["params"]
        step = tree.sub(average["params"], params)
        movement = tree.add(step, server["movement"], self.beta)
        return {"weights": average | {"params": tree.add(params, movement)}, "movement": movement}
