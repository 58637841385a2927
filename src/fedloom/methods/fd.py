"""FD: clients exchange their mean predictions for each class, and learn from the predictions of other clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import losses
from fedloom.method import (
    Batch,
    Client,
    ClientData,
    Combines,
    Downlink,
    Logs,
    Method,
    Need,
    Paper,
    Phase,
    Predictor,
    Round,
    Sweep,
    Task,
    Turn,
    predict_model,
)
from fedloom.methods import feature_statistics
from fedloom.nets import Nets
from fedloom.ranges import NonNegative
from fedloom.tree import Tree, Weights


@dataclass(frozen=True)
class FD(Method):
    """FD (Jeong et al., 2018): federated distillation, for models of any architectures.

    For each of its classes y, a client sends F_y, the mean of its predicted probabilities (Y,) over its examples of the class. It receives
    the mean of the *other* clients' F_y. For an example of class y with predicted probabilities p, it adds gamma * CE(mean F_y, p) to the
    cross-entropy.

    Sent: The uplink contains mean predictions F_y and the number of examples per class (the server only checks which numbers are 0). The
    downlink contains mean predictions, and the number of clients in each mean. Kept: Each client keeps its whole model, which is scored.
    There is no server model.

    Means include the clients of the latest round, so a class without examples on these clients adds no term. A member of that round
    receives the mean without its own F_y; other clients receive the mean over all members. F_y is computed after training, in evaluation
    mode; in the paper, it is a mean over the training steps. The data augmentation of the same paper (FAug) is not implemented.

    Differences from the code in HtFLlib and PFLlib: these libraries average logits and use them as probabilities in the cross-entropy,
    which then has no lower bound. Their means include the client's own logits.
    """

    gamma: NonNegative = 1.0
    """Weight of the cross-entropy with the other clients' predictions (HtFLlib's setting)."""

    shared: ClassVar[tuple[str, ...]] = ()
    also_travels: ClassVar[tuple[str, ...]] = ("predictions", "counts")
    combines: ClassVar[Combines] = "individual"
    needs: ClassVar[tuple[Need, ...]] = ("classes",)
    paper: ClassVar[Paper] = Paper(
        "Communication-efficient on-device machine learning: Federated distillation and augmentation under non-IID private data",
        "Jeong, Oh, Kim, Park, Bennis, Kim",
        "NeurIPS 2018 workshop",
        "https://arxiv.org/abs/1811.11479",
    )

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return zero counts (Y,) and sums of predictions by class (Y, Y)."""
        return {"means": feature_statistics.no_sums(task.n_classes, task.n_classes)}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return empty tensors for the uplinks of one round: predictions (M, Y, Y), counts (M, Y), and the clients' numbers (M,).

        M is the largest cohort. A slot without an uplink has the client number -1.
        """
        m, y = task.max_cohort, task.n_classes
        return {"predictions": torch.zeros(m, y, y), "counts": torch.zeros(m, y), "clients": torch.full((m,), -1)}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return mean predictions for each member of the cohort, without its own predictions."""
        if not cohort:
            return Downlink(self.mean_without(server, -1))
        return Downlink(each=[self.mean_without(server, client) for client in cohort])

    def mean_without(self, server: Tree, client: int) -> Tree:
        """Return the mean predictions (Y, Y) of the clients other than `client`, and the number of clients in each mean (Y,)."""
        held = (server["counts"] > 0) & (server["clients"] != client)[:, None]
        counts = held.sum(0).to(server["counts"].dtype)
        sums = torch.where(held[:, :, None], server["predictions"], 0).sum(0)
        return {"predictions": sums / counts.clamp(min=1)[:, None], "counts": counts}

    def phases(self) -> tuple[Phase, ...]:
        """Return the training phase, and a sweep that collects the trained model's predictions."""
        return *super().phases(), Sweep("means", self.collect)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the cross-entropy plus gamma times the cross-entropy with the other clients' mean predictions.

        The second term is 0 for examples of a class without predictions.
        """
        logits, known = nets.model(batch.x), down["counts"][batch.y] > 0
        target: Tensor = down["predictions"][batch.y]
        distance = -(target * losses.wide(logits).log_softmax(1)).sum(1)
        error, distilled = nets.loss(logits, batch.y), (known * distance).mean()
        return error + self.gamma * distilled, {"cross_entropy": error, "distillation": distilled}

    def collect(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add the predicted probabilities of a batch to the counts and sums."""
        return feature_statistics.add_sums(total, losses.wide(nets.model(batch.x)).softmax(1), batch.y)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the mean predictions (C_k, Y) of the client's classes, in the order of the classes, and the counts (Y,) of all classes."""
        found, dtype = client.memory["means"], down["predictions"].dtype
        predictions = feature_statistics.held_means(found, dtype)
        return {"predictions": predictions, "counts": found["counts"].to(dtype)}, client.memory

    def ragged(self, uplink: Tree) -> Mapping[str, int]:
        """Return the number of the client's classes, each of which has one mean prediction."""
        return {"predictions": int((uplink["counts"] > 0).sum())}

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a message if a prediction is not a probability or a count is impossible, and an empty string otherwise."""
        predictions: Tensor = uplink["predictions"]
        outside = bool(((predictions < 0) | (predictions > 1.001)).any())  # 1 may have been rounded
        fault = "'predictions' has a number that is not a probability" if outside else ""
        return fault or feature_statistics.count_fault(uplink["counts"], class_counts)

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the uplinks of this round, which replace those of the previous round."""
        predictions, counts, clients = (torch.zeros_like(server[key]) for key in ("predictions", "counts", "clients"))
        clients -= 1
        for slot, (uplink, arrival) in enumerate(zip(uplinks, round.arrivals, strict=True)):
            counts[slot], clients[slot] = uplink["counts"], arrival.client
            predictions[slot, uplink["counts"] > 0] = uplink["predictions"]
        return {"predictions": predictions, "counts": counts, "clients": clients}

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's model as its predictor. There is no server model."""
        return {"personal": predict_model}
