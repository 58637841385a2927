"""The contract: what a federated method is. `Method` itself is FedAvg; a paper overrides only what it changes.

A method is a frozen dataclass that holds hyper-parameters and nothing else. Its hooks are pure functions of trees of tensors; local
work is declared as data (`Train`, `Interleave`, `Sweep`, `Free`), so that an engine may loop it, map it over clients, or ship it.

One round, and who calls what (`server` is any tree, `weights` as in `fedloom.nets`)::

    server  cohort -> downlink
    client  receive -> phases (loss, draw) -> uplink          the engine runs this part, wherever the client lives
    client  exchange                                          among themselves, where `exchanges` says so
    server  aggregate                                         over those who arrived
    score   deploy -> receive -> adapt -> predictors          on evaluation rounds, on throw-away copies
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from fedloom import losses, optim, ranges, tree
from fedloom.errors import MethodError
from fedloom.nets import Nets, select
from fedloom.optim import Optimizer
from fedloom.ranges import Count, Fraction, NonNegative, Positive, Share
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights


class Architecture(Protocol):
    """What a method may ask of an architecture (see `fedloom.models.Arch`)."""

    def model(self) -> nn.Module:
        """The whole model: a `body` that gives features (B, D), and a linear `head` that gives logits (B, Y)."""

    def body(self, width: int | None = None) -> nn.Module:
        """The body alone, with `width` features."""

    def head(self, features: int | None = None) -> nn.Linear:
        """A linear head on so many features."""

    @property
    def features(self) -> int:
        """The body's number of features D."""

    @property
    def name(self) -> str:
        """What to call it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Facts of the problem, read-only."""

    n_clients: int
    max_cohort: int  # the most clients that a round can have
    n_classes: int
    input_shape: tuple[int, ...]
    width: int  # features D of the first architecture (of all of them, where clients differ)
    rounds: int


class Client(NamedTuple):
    """All that a client keeps. The structure is complete from round 0 and never changes."""

    weights: Weights
    memory: Tree
    opts: Tree  # optimiser states of the phases that keep theirs, by phase
    unsent: Tree = {}  # what a transform of uplinks has held back so far, by part (`fedloom.wire.codec`)


class Batch(NamedTuple):
    """One batch of a client's rows."""

    x: Tensor  # (B, ...) inputs, normalised
    y: Tensor  # (B,) labels
    draws: Mapping[str, Tensor] = {}  # what the phase's `draw` made for this batch
    precomputed: Mapping[str, Tensor] = {}  # what the `Interleave`'s `precompute` made of this batch


class Turn(NamedTuple):
    """One client's part in a round."""

    number: int  # the round, from 0
    last: int  # the number of the last round
    examples: int  # n_k, the client's training rows
    steps: Mapping[str, int] = {}  # optimiser steps taken, by phase


class Arrival(NamedTuple):
    """A client whose uplink reached the server."""

    client: int
    slot: int  # its place in the cohort
    share: float  # its part of the examples of all who arrived; shares sum to 1
    age: int = 0  # rounds since it was sent the downlink


class Round(NamedTuple):
    """What the server knows of a round: who arrived, in cohort order, and a stream for its own randomness."""

    number: int
    n_clients: int  # K, in the whole federation
    arrivals: tuple[Arrival, ...]
    rng: Stream

    @property
    def shares(self) -> list[float]:
        """Each arrival's part of the examples; sums to 1."""
        return [arrival.share for arrival in self.arrivals]


class Downlink(NamedTuple):
    """What the server sends: one tree for all, and over it, if given, one tree for each member of the cohort in cohort order."""

    common: Tree = {}
    each: Sequence[Tree] | None = None

    def to(self, slot: int) -> Tree:
        """The whole message to one member of the cohort."""
        return self.common if self.each is None else tree.merge(self.common, self.each[slot])


Logs = dict[str, Tensor]
LossFn = Callable[[Nets, Batch, Tree, Tree], "Tensor | tuple[Tensor, Logs]"]
DrawFn = Callable[[Batch, Task, Stream], Mapping[str, Tensor]]
PrecomputeFn = Callable[[Nets, Batch, Tree, Tree], Mapping[str, Tensor]]
Predictor = Callable[[Nets, Tensor, Tree, Tree], Tensor]


@dataclass(frozen=True)
class Train:
    """Minimise a loss over the client's rows."""

    name: str
    loss: LossFn  # (nets, batch, down, memory) -> 0-d loss, or (loss, {name: 0-d tensor to log})
    params: tuple[str, ...]  # patterns of parameters to update (`fedloom.nets.select`)
    optimizer: Optimizer
    epochs: int = 1
    _: KW_ONLY
    steps: int | None = None  # a number of steps in place of epochs
    draw: DrawFn | None = None  # (batch, task, stream) -> the step's random tensors, drawn outside any mapped code
    keep_state: bool = False  # whether the optimiser's state lasts over rounds
    train_mode: tuple[str, ...] | None = (
        None  # nets in training mode (default: those it trains); the others are in evaluation mode
    )
    when: Callable[[Turn], bool] | None = None  # whether to run in this turn (default: always)

    def __post_init__(self) -> None:
        """Refuse work that would never begin or never end."""
        if self.epochs < 1 or (self.steps is not None and self.steps < 1):
            raise MethodError(f"phase '{self.name}': epochs={self.epochs}, steps={self.steps}: must be at least 1")

    @property
    def modes(self) -> tuple[str, ...]:
        """The nets in training mode."""
        return self.train_mode if self.train_mode is not None else tuple(p.partition(":")[0] for p in self.params)

    def works_in(self, turn: Turn) -> bool:
        """Whether it runs in this turn."""
        return self.when is None or self.when(turn)


@dataclass(frozen=True)
class Interleave:
    """Several `Train`s that take turns on every batch, in order; the members' own epochs and steps do not count.

    What several members need of a batch, `precompute` computes before the first of them steps, with the nets that any of them has in
    training mode in training mode; they find it in `batch.precomputed`. Gradients flow through it in the last member alone, so only
    that one may train what it depends on; for the others it is numbers.
    """

    name: str
    members: tuple[Train, ...]
    epochs: int = 1
    _: KW_ONLY
    steps: int | None = None
    precompute: PrecomputeFn | None = None  # (nets, batch without draws, down, memory) -> {name: tensor}

    def __post_init__(self) -> None:
        """Refuse work that would never begin or never end."""
        if not self.members or self.epochs < 1 or (self.steps is not None and self.steps < 1):
            raise MethodError(f"phase '{self.name}': needs members, and epochs or steps of at least 1")


@dataclass(frozen=True)
class Sweep:
    """Visit every row once, in evaluation mode and without gradients, to fill `memory[name]`, which starts from zeros."""

    name: str
    step: Callable[[Nets, Batch, Tree, Tree, Tree], Tree]  # (nets, batch, accumulated, down, memory) -> accumulated


@dataclass(frozen=True)
class Free:
    """Any local work at all: runs on every engine but never vectorised."""

    name: str
    run: Callable[[Client, Nets, Batch, Tree, Stream], Client]  # (client, nets, all its rows, down, stream) -> client


Phase = Train | Interleave | Sweep | Free


class Paper(NamedTuple):
    """Where a method comes from."""

    title: str
    authors: str
    venue: str
    url: str = ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """FedAvg, and the base of every method."""

    lr: Positive = 0.05
    """Learning rate of the local optimiser."""
    momentum: Fraction = 0.0
    """Momentum (SGD only)."""
    weight_decay: NonNegative = 0.0
    """L2 penalty, added to the gradient."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Local optimiser; its state starts afresh in every round unless the method keeps it."""
    lr_decay: Share = 1.0
    """The learning rate is multiplied by this after every round."""
    local_epochs: Count = 1
    """Passes over the client's training rows in a round."""
    buffers: Literal["shared", "private"] = "shared"
    """Whether BatchNorm's running statistics travel (and are averaged) with the shared nets or stay with the client."""

    paper: ClassVar[Paper]
    shared: ClassVar[tuple[str, ...]] = ("model",)  # the weights that travel, as patterns
    also_travels: ClassVar[
        tuple[str, ...]
    ] = ()  # what else uplinks or downlinks carry, for listings: names beside "weights"
    keeps_shared: ClassVar[bool] = False  # whether a client keeps its trained copy of what travels for the next round
    accepts_late: ClassVar[bool] = (
        False  # whether `aggregate` can take in uplinks of earlier rounds (see `Arrival.age`)
    )
    pooled: ClassVar[bool] = False  # whether one client holds all rows (an upper reference, not a federated method)

    def __post_init__(self) -> None:
        """Refuse values that no method can mean."""
        ranges.check_limits(self)

    # what exists

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """The nets of a client, fresh. Called once per architecture and process, never inside a loss."""
        return {"model": arch.model()}

    def init_memory(self, weights: Weights, task: Task) -> Tree:
        """What a client remembers besides weights, with its full structure."""
        return {}

    def init_server(self, weights: Weights, task: Task) -> Tree:
        """The server's state before the first round; `weights` are a client's initial ones."""
        return {"weights": self.travelling(weights)}

    # server, before a round

    def cohort(self, server: Tree, task: Task, size: int, rng: Stream) -> Sequence[int]:
        """Who takes part: `size` clients drawn uniformly without replacement."""
        return sorted(rng.permutation(task.n_clients)[:size].tolist())

    def downlink(self, server: Tree, cohort: Sequence[int]) -> Downlink:
        """What the cohort is sent."""
        return Downlink({"weights": server["weights"]})

    # client

    def receive(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """The weights with which the client starts its turn. Every travelling tensor must be replaced."""
        if not self.shared:
            return weights
        if "weights" not in down:
            raise MethodError(
                "the downlink has no 'weights' to take: override `receive`, and let `predictors` name no server"
            )
        sent, mine = down["weights"], self.travelling(weights)
        missing = [f"{kind}/{name}" for kind, part in mine.items() for name in part if name not in sent.get(kind, {})]
        if missing:
            raise MethodError(f"the downlink lacks {min(missing)} and {len(missing) - 1} more tensors that travel")
        return tree.merge(weights, down["weights"])

    def phases(self) -> tuple[Phase, ...]:
        """The local work of a turn; the same in every round (a member's `when` may switch it off)."""
        return (Train("train", self.loss, ("model",), self.local_optimizer(), epochs=self.local_epochs),)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor | tuple[Tensor, Logs]:
        """The mean cross-entropy of `model`."""
        return losses.cross_entropy(nets.model(batch.x), batch.y)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """What the client sends, and its memory for its next turn."""
        return {"weights": self.travelling(client.weights)}, client.memory

    def ragged(self, uplink: Tree) -> Mapping[str, int]:
        """Tensors of an uplink whose first dimension depends on the client's rows, by path, with the length that each must have."""
        return {}

    # clients among themselves

    @property
    def exchanges(self) -> bool:
        """Whether clients exchange parts of their uplinks before the server sees them. Devices need an encrypted relay for that."""
        return False

    def exchange(self, uplinks: Sequence[Tree], rng: Stream) -> Sequence[Tree]:
        """What the server gets to see in place of the uplinks of those who arrived; as many, but no longer client by client."""
        return uplinks

    # server, after a round

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """The server's next state, from the uplinks of those who arrived (at least one), in cohort order."""
        return {"weights": tree.mean([up["weights"] for up in uplinks], round.shares)}

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Finite numbers that tell of an evaluated round, from the server *before* it and the uplinks; recorded as `server.<name>`."""
        return {}

    # use

    def deploy(self, server: Tree, task: Task) -> Downlink:
        """What any client would be sent to predict with now."""
        return self.downlink(server, ())

    def adapt(self) -> tuple[Phase, ...]:
        """Local work before predicting, on a copy that is thrown away."""
        return ()

    def predictors(self) -> dict[str, Predictor]:
        """`personal`: a client's predictor; `server`: the server's, where it has a model. (nets, x, down, memory) -> logits (B, Y)."""
        return {"personal": predict_model, "server": predict_model}

    # for methods to call

    def travelling(self, weights: Weights) -> Weights:
        """The part of a client's weights that travels: `shared`, with or without buffers."""
        return select(weights, self.shared, buffers=self.buffers == "shared")

    def local_optimizer(self, lr: float | None = None) -> Optimizer:
        """The optimiser that the hyper-parameters name, with another learning rate if given."""
        if self.optimizer == "adam":
            return optim.adam(lr or self.lr, weight_decay=self.weight_decay)
        return optim.sgd(lr or self.lr, self.momentum, self.weight_decay)

    def lr_scale(self, number: int) -> float:
        """The factor on the learning rate in a round."""
        return self.lr_decay**number


def predict_model(nets: Nets, x: Tensor, down: Tree, memory: Tree) -> Tensor:
    """Logits (B, Y) of `model`."""
    logits: Tensor = nets.model(x)
    return logits


def trains_of(phases: Iterable[Phase]) -> list[Train]:
    """Every `Train` of some phases, those inside an `Interleave` too."""
    found: list[Train] = []
    for phase in phases:
        found += [phase] if isinstance(phase, Train) else list(phase.members) if isinstance(phase, Interleave) else []
    return found


def init_opts(phases: Iterable[Phase], weights: Weights) -> Tree:
    """The optimiser states that a client keeps over rounds, by phase."""
    return {
        train.name: train.optimizer.init(select(weights, train.params)["params"])
        for train in trains_of(phases)
        if train.keep_state
    }


def without(phases: Iterable[Phase], weights: Weights, frozen: Weights) -> tuple[Phase, ...]:
    """The phases with the tensors of `frozen` out of their reach; a `Train` that is left with nothing to train is left out.

    A net that is frozen whole, running statistics too, is in evaluation mode. `Sweep` and `Free` phases stay as they are.
    """
    free = {kind: [name for name in part if name not in frozen[kind]] for kind, part in weights.items()}
    nets = {name.partition(".")[0] for names in free.values() for name in names}

    def reduced(train: Train) -> Train:
        names = select(weights, train.params)["params"].keys() & set(free["params"])
        in_order = tuple(name for name in weights["params"] if name in names)
        return replace(train, params=in_order, train_mode=tuple(net for net in train.modes if net in nets))

    found: list[Phase] = []
    for phase in phases:
        if isinstance(phase, Sweep | Free):
            found.append(phase)
            continue
        members = [reduced(train) for train in trains_of([phase])]
        members = [train for train in members if train.params]
        if members:
            found.append(replace(phase, members=tuple(members)) if isinstance(phase, Interleave) else members[0])
    return tuple(found)
