"""The contract between a federated method and the framework. `Method` itself is FedAvg; override only what your paper changes.

A method is a frozen dataclass that contains only hyper-parameters. Its hooks are pure functions of trees of tensors. A client's local
update is declared as data (`Train`, `Interleave`, `Sweep`, `Set`), so an engine can run it in a loop, vectorise it over clients, or send
it to another process. `docs/contract.md` describes every hook with an example.

One round calls these hooks in this order. `server` is any tree; `weights` has the form described in `fedloom.nets`::

    server  cohort -> downlink
    client  receive -> phases (loss, draw) -> uplink          run by the engine, in any process or on a device
    client  exchange                                          among clients, if `exchanges` is true
    server  aggregate                                         over the uplinks that arrived
    score   deploy -> receive -> adapt -> predictors          in evaluated rounds, on temporary copies
    end     downlink -> receive -> phases -> uplink -> finish after the last round, with all clients, if `finish` is overridden
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from fedloom import optim, ranges, tree
from fedloom.errors import MethodError
from fedloom.inputs import InputSpec
from fedloom.nets import Nets, select
from fedloom.objectives import Objective
from fedloom.optim import Optimizer
from fedloom.ranges import Count, Fraction, NonNegative, Positive, Share
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights


class Architecture(Protocol):
    """The parts of an architecture that a method may use (see `fedloom.models.Arch`)."""

    def model(self) -> nn.Module:
        """Return the whole model: a `body` that outputs features (B, D), and a linear `head` that outputs logits (B, Y)."""

    def body(self, width: int | None = None) -> nn.Module:
        """Return the body alone, with `width` features."""

    def head(self, features: int | None = None) -> nn.Linear:
        """Return a linear head for inputs of `features` dimensions (default: D)."""

    @property
    def features(self) -> int:
        """The number D of features that the body outputs."""

    @property
    def name(self) -> str:
        """The architecture's name."""

    @property
    def common(self) -> Architecture:
        """The architecture of the model that all clients have in addition to their own (`common_model`). Default: this architecture."""

    @property
    def has_head(self) -> bool:
        """Whether the model ends in a linear head."""

    @property
    def has_vector(self) -> bool:
        """Whether the body outputs one feature vector per example."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Read-only facts about the learning problem."""

    n_clients: int
    max_cohort: int  # the largest number of clients in a round
    objective: Objective
    spec: InputSpec
    width: int  # number of features D of the first architecture
    rounds: int
    lr_scales: tuple[float, ...] = ()  # factors on the learning rates, by round (`schedule`); empty means 1

    @property
    def n_classes(self) -> int:
        """Number of classes, Y. Raise DataError if the learning task has no classes."""
        return self.objective.n_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example's input, such as (C, H, W) for images. If there are several inputs, the shape of the first."""
        return self.spec.shape


class Client(NamedTuple):
    """Everything that a client keeps between rounds. The structure is complete from round 0 and never changes."""

    weights: Weights
    memory: Tree
    opts: Tree  # optimiser states of the phases with `keep_state`, by name of the phase
    unsent: Tree = {}  # residuals that lossy compression of uplinks has not sent yet, by kind (`fedloom.wire.codec`)


class Batch(NamedTuple):
    """One batch of a client's examples."""

    x: Any  # (B, ...) normalised inputs; a dictionary of such tensors if there are several
    y: Tensor  # (B, ...) targets, such as class labels (B,); see `fedloom.objectives`
    draws: Mapping[str, Tensor] = {}  # the tensors that the phase's `draw` returned for this batch
    precomputed: Mapping[str, Tensor] = {}  # the tensors that the `Interleave`'s `precompute` returned for this batch


@dataclass(frozen=True)
class Turn:
    """Facts about one client's local update in one round."""

    number: int  # the round, from 0
    last: int  # the number of the last round
    examples: int  # n_k, the number of the client's training examples
    steps: Mapping[str, int] = field(default_factory=dict)  # number of optimiser steps taken, by name of the phase
    _: KW_ONLY
    closing: bool = False  # whether this is the final exchange, after the last round (see `Method.finish`)
    lr_scale: float = 1.0  # factor on all learning rates of this local update (`lr_decay` and `schedule`)


class ClientData(NamedTuple):
    """Facts about a client's training examples that are known before the first round."""

    examples: int  # n_k
    class_counts: Tensor  # (Y,) number of examples of each class, in the default dtype; (0,) without classes


class Arrival(NamedTuple):
    """A client whose uplink reached the server."""

    client: int
    slot: int  # the client's position in the cohort
    share: float  # weight in the aggregation: the fraction of all examples, or equal (`equal_shares`); less if late; shares sum to 1
    age: int = 0  # number of rounds since the downlink was sent to the client


BindFn = Callable[[Weights], Nets]


def _no_nets(weights: Weights) -> Nets:
    raise MethodError("round.nets: not available in this hook; use it in aggregate, finish, server_logs or deploy")


@dataclass(frozen=True)
class Round:
    """The server's information about a round, for all server hooks, and a random stream for their draws."""

    number: int  # from 0; in `deploy`, the number of completed rounds
    n_clients: int  # K, the number of clients in the whole federation
    arrivals: tuple[Arrival, ...]  # in cohort order; empty in hooks that are called before the uplinks arrive
    rng: Stream  # a separate stream for each hook and round
    _: KW_ONLY
    examples: tuple[int, ...] = ()  # the numbers n_k of all K clients, known before the first round
    nets: BindFn = (
        _no_nets  # weights -> the nets of the first architecture and of `server_nets`, to train on the server
    )

    @property
    def shares(self) -> list[float]:
        """The arrivals' shares in their order; they sum to 1."""
        return [arrival.share for arrival in self.arrivals]


class Downlink(NamedTuple):
    """The server's message: a common tree for the whole cohort and, optionally, one tree per member in cohort order.

    A member's tree is merged into the common tree and replaces leaves with the same path. In the result of `deploy`, `each` has one tree
    for every client of the federation, indexed by the client's number.
    """

    common: Tree = {}
    each: Sequence[Tree] | None = None

    def to(self, slot: int) -> Tree:
        """Return the complete message to the member at position `slot` of the cohort. A client that joined later receives `common` only."""
        return self.common if self.each is None or slot >= len(self.each) else tree.merge(self.common, self.each[slot])


Logs = dict[str, Tensor]
LossFn = Callable[[Nets, Batch, Tree, Tree], "Tensor | tuple[Tensor, Logs]"]
DrawFn = Callable[[Batch, Task, Stream], Mapping[str, Tensor]]
PrecomputeFn = Callable[[Nets, Batch, Tree, Tree], Mapping[str, Tensor]]
Predictor = Callable[[Nets, Any, Tree, Tree], Tensor]
Combines = Literal["mean", "sums", "individual"]
Need = Literal["classes", "pictures", "vector", "head", "common_model"]
"""A requirement of a method: class labels, images as inputs, one feature vector per example, a model with a linear head, or one
architecture that all clients have in common (`Architecture.common`)."""


@dataclass(frozen=True)
class NamedPhase:
    """The common part of all phases. The phases of one local update must have different names."""

    name: str
    _: KW_ONLY
    when: Callable[[Turn], bool] | None = (
        None  # whether to run in this local update; default: in every round, but not in the final exchange
    )

    def works_in(self, turn: Turn) -> bool:
        """Return whether the phase runs in this local update."""
        return not turn.closing if self.when is None else self.when(turn)


@dataclass(frozen=True)
class Train(NamedPhase):
    """Minimise a loss over the client's training examples."""

    loss: LossFn  # (nets, batch, down, memory) -> 0-d loss, or (loss, {name: 0-d tensor to log})
    params: tuple[str, ...]  # patterns of parameters to update (`fedloom.nets.select`)
    optimizer: Optimizer
    epochs: int = 1
    _: KW_ONLY
    steps: int | None = None  # number of steps, instead of epochs
    draw: DrawFn | None = None  # (batch, task, stream) -> the step's random tensors, drawn outside vectorised code
    keep_state: bool = False  # whether the optimiser's state is kept between rounds
    balanced: bool = False  # draw examples with replacement, so that each of the client's classes is equally likely
    repeats: int = 1  # number of optimiser steps on each batch
    train_mode: tuple[str, ...] | None = (
        None  # the nets in training mode (default: those it trains); all others are in evaluation mode
    )

    def __post_init__(self) -> None:
        """Raise MethodError if the phase would take no steps."""
        if self.epochs < 1 or self.repeats < 1 or (self.steps is not None and self.steps < 1):
            counts = f"epochs={self.epochs}, steps={self.steps}, repeats={self.repeats}"
            raise MethodError(f"phase '{self.name}': {counts}: must be at least 1")

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of the nets in training mode."""
        return self.train_mode if self.train_mode is not None else tuple(p.partition(":")[0] for p in self.params)


@dataclass(frozen=True)
class Interleave(NamedPhase):
    """Several `Train`s that alternate on every batch, in order. Their own `epochs` and `steps` are ignored.

    `precompute` computes what several members need from a batch, before the first member takes its step. Members read the result from
    `batch.precomputed`. During `precompute`, a net is in training mode if any member puts it in training mode. Gradients flow through the
    result in the last member only. Therefore, only the last member may train the parameters on which the result depends; for all other
    members, the result is constant. A member's own `when` may skip the member in a local update.
    """

    members: tuple[Train, ...]
    epochs: int = 1
    _: KW_ONLY
    steps: int | None = None
    balanced: bool = False  # see `Train`
    precompute: PrecomputeFn | None = None  # (nets, batch without draws, down, memory) -> {name: tensor}

    def __post_init__(self) -> None:
        """Raise MethodError if the phase would take no steps."""
        if not self.members or self.epochs < 1 or (self.steps is not None and self.steps < 1):
            raise MethodError(f"phase '{self.name}': needs members, and epochs or steps of at least 1")
        if self.precompute and self.members[-1].repeats > 1:
            raise MethodError(
                f"phase '{self.name}': with `precompute`, the last member can take only one step per batch"
            )


@dataclass(frozen=True)
class Sweep(NamedPhase):
    """Visit every example once, in evaluation mode, to fill `memory[name]`, which starts from zeros.

    Automatic differentiation is off. A step that needs a gradient computes it with `nets.gradient`.
    """

    step: Callable[[Nets, Batch, Tree, Tree, Tree], Tree]  # (nets, batch, accumulated, down, memory) -> accumulated
    _: KW_ONLY
    rows: Literal["train", "valid"] = "train"  # a client without validation examples visits its training examples


@dataclass(frozen=True)
class Set(NamedPhase):
    """Compute the client's weights from its weights, the downlink and its memory, without its examples."""

    weights: Callable[
        [Weights, Tree, Tree], Weights
    ]  # (weights, down, memory) -> weights, with the same names and shapes


Phase = Train | Interleave | Sweep | Set


F = TypeVar("F", bound=Callable[..., Any])


def server_side(hook: F) -> F:
    """Mark a hook of `Method` as part of the server's half of a composed method."""
    hook.side = "server"  # type: ignore[attr-defined]
    return hook


def client_side(hook: F) -> F:
    """Mark a hook of `Method` as part of the clients' half of a composed method."""
    hook.side = "client"  # type: ignore[attr-defined]
    return hook


class Paper(NamedTuple):
    """The publication that a method comes from."""

    title: str
    authors: str
    venue: str
    url: str = ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """FedAvg, which is also the base class of every method."""

    lr: Positive = 0.05
    """Learning rate of the local optimiser."""
    momentum: Fraction = 0.0
    """Momentum (SGD only)."""
    weight_decay: NonNegative = 0.0
    """Coefficient of the L2 penalty, which is added to the gradient."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Local optimiser. Its state is reset every round unless the method keeps the state."""
    lr_decay: Share = 1.0
    """Factor by which the learning rate is multiplied after every round, in addition to `schedule`."""
    local_epochs: Count = 1
    """Number of passes over the client's training examples in a round."""
    buffers: Literal["shared", "private"] = "shared"
    """If shared, BatchNorm's running statistics are sent with the shared nets and averaged. If private, they stay with the client."""

    paper: ClassVar[Paper]
    shared: ClassVar[tuple[str, ...]] = ("model",)  # patterns of the weights that are sent (`fedloom.nets.select`)
    also_travels: ClassVar[tuple[str, ...]] = ()  # names of what messages contain in addition to weights, for listings
    keeps_shared: ClassVar[bool] = (
        False  # whether a client keeps its trained copy of the shared weights for the next round
    )
    uses_rounds: ClassVar[bool] = (
        False  # whether a hook depends on `Task.rounds` or `Turn.last`; such runs cannot be extended
    )
    equal_shares: ClassVar[bool] = (
        False  # whether clients have equal weights in a mean, regardless of their numbers of examples
    )
    accepts_late: ClassVar[bool] = False  # whether `aggregate` can handle uplinks from earlier rounds (`Arrival.age`)
    combines: ClassVar[Combines] = "mean"  # what `aggregate` uses from the uplinks (see `sums`)
    needs: ClassVar[tuple[Need, ...]] = ()  # requirements for data and model, with the default hyper-parameters
    pooled: ClassVar[bool] = False  # whether one client holds all examples (not a federated method)

    def __post_init__(self) -> None:
        """Raise ValueError for a hyper-parameter outside its limits, and MethodError for a `shared` that is not a tuple."""
        ranges.check_limits(self)
        shared: object = self.shared
        if isinstance(shared, str):
            name = type(self).__name__
            raise MethodError(f"{name}.shared is a string; write a tuple, with a comma: ('{shared}',)")

    @property
    def needed(self) -> frozenset[Need]:
        """The method's requirements with these hyper-parameters. If one is not met, the run ends with a one-line error before training."""
        return frozenset(self.needs)

    @property
    def remedy(self) -> str:
        """Settings of the method with which it has fewer requirements, for error messages. A non-empty text ends with ", or "."""
        return ""

    # initial state

    @client_side
    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Build and return a client's nets. This hook is called once per architecture and process, and never inside a loss."""
        return {"model": arch.model()}

    @server_side
    def server_nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Build and return nets that only the server has; `arch` is the first architecture. `init_server` also receives their weights."""
        return {}

    @client_side
    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return a client's initial memory with its full structure.

        A client keeps its memory between rounds, in addition to its weights.
        """
        return {}

    @server_side
    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the server's state before the first round; `weights` are the initial weights of a client and of `server_nets`."""
        return {"weights": self.travelling(weights)}

    # server, before a round

    @server_side
    def cohort(self, server: Tree, task: Task, size: int, round: Round) -> Sequence[int]:
        """Choose the clients of a round: `size` clients, drawn uniformly without replacement."""
        return sorted(round.rng.permutation(task.n_clients)[:size].tolist())

    @server_side
    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return the message to the cohort."""
        return Downlink({"weights": server["weights"]})

    # client

    @client_side
    def receive(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the weights from which the client starts its local update. Every shared tensor must be replaced by a received tensor."""
        if not self.shared:
            return weights
        if "weights" not in down:
            raise MethodError(
                "the downlink has no 'weights'; override `receive`, and leave 'server' out of `predictors`"
            )
        sent, mine = down["weights"], self.travelling(weights)
        missing = [f"{kind}/{name}" for kind, part in mine.items() for name in part if name not in sent.get(kind, {})]
        if missing:
            raise MethodError(
                f"the downlink must contain all shared weights, but lacks {len(missing)} of them, such as {min(missing)}"
            )
        return tree.merge(weights, down["weights"])

    @client_side
    def phases(self) -> tuple[Phase, ...]:
        """Return the phases of a local update. They are the same in every round, but a phase's `when` may skip the phase."""
        return (Train("train", self.loss, ("model",), self.local_optimizer(), epochs=self.local_epochs),)

    @client_side
    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor | tuple[Tensor, Logs]:
        """Return the mean loss of `model`, such as cross-entropy for classes; see `fedloom.objectives`."""
        return nets.loss(nets.model(batch.x), batch.y)

    @client_side
    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the client's uplink and its memory for the next local update."""
        return {"weights": self.travelling(client.weights)}, client.memory

    @client_side
    def ragged(self, uplink: Tree) -> Mapping[str, int]:
        """Return the required length, by path, of the uplink tensors whose first dimension depends on the client's examples."""
        return {}

    @client_side
    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return the reason why an uplink's statistics are impossible, or "". If uplinks are screened, this hook is called before
        `aggregate`.

        `class_counts` is the client's number of training examples of each class (Y,), or None if the server does not have these numbers.
        """
        return ""

    # between clients

    @property
    @server_side
    def exchanges(self) -> bool:
        """Whether clients exchange parts of their uplinks before the server sees them.

        On real devices, this requires an encrypted relay.
        """
        return False

    @server_side
    def exchange(self, uplinks: Sequence[Tree], rng: Stream) -> Sequence[Tree]:
        """Return the trees that replace the uplinks that arrived: the same number of trees, but no longer one tree per client."""
        return uplinks

    # server, after a round

    @server_side
    def sums(self, uplink: Tree) -> Tree:
        """Return the tensors that `aggregate` only adds up over clients. They have the same shapes for every client.

        In `combines`, a method states what `aggregate` needs: the mean of the uplinks ("mean"; this hook then returns the uplink itself),
        the total of what this hook returns ("sums"), or each uplink ("individual"). If a method overrides `aggregate` but does not set
        `combines`, `aggregate=RULE` is refused.
        """
        return uplink

    @server_side
    def from_sums(self, total: Tree, n: int) -> Tree:
        """Return one uplink that represents all uplinks.

        Aggregating n copies of it has the same result as aggregating n uplinks whose `sums` add up to `total`.
        """
        return tree.map_tree(lambda leaf: leaf / n, total)

    @server_side
    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the server's next state from the uplinks that arrived (at least one), in cohort order."""
        return {"weights": tree.mean([up["weights"] for up in uplinks], round.shares)}

    @server_side
    def finish(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the server's final state, with the same structure, from the uplinks of the final exchange.

        If a method overrides this hook, all clients run one more local update after the last round and send its `uplink`. In this local
        update, only those phases run whose `when` is true for it (`Turn.closing`).
        """
        return server

    @server_side
    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return finite numbers that describe an evaluated round, computed from the server *before* it and the uplinks.

        They are recorded as `server.<name>`.
        """
        return {}

    # prediction

    @server_side
    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return the message that clients would receive to make predictions now.

        The message may contain `each`, with one tree for every client. Clients that join later and the server's own model use `common`
        alone.
        """
        return Downlink(self.downlink(server, (), round).common)

    @client_side
    def adapt(self) -> tuple[Phase, ...]:
        """Return the phases to run before predicting, on a copy that is discarded."""
        return ()

    @client_side
    def predictors(self) -> dict[str, Predictor]:
        """Return the predictors. A predictor is a function (nets, x, down, memory) -> outputs, such as logits (B, Y).

        `personal` is a client's predictor. `server` is the server's predictor, if the server has a model.
        """
        return {"personal": predict_model, "server": predict_model}

    @client_side
    def shared_features(self) -> Predictor | None:
        """Return the function (nets, x, down, memory) -> features (B, D) of the shared body, or None if no body is shared.

        `eval.shared_head` fits one classifier for all clients on these features. The default is the body of `model`.
        """
        return model_features if {"model", "model:body", "model:-head", "model:-norm"} & {*self.shared} else None

    # helpers for methods

    @client_side
    def travelling(self, weights: Weights) -> Weights:
        """Return the part of a client's weights that is sent: the weights named by `shared`, with or without buffers."""
        return select(weights, self.shared, buffers=self.buffers == "shared")

    @client_side
    def local_optimizer(self, lr: float | None = None) -> Optimizer:
        """Return the optimiser that the hyper-parameters describe. If `lr` is given, it replaces the learning rate."""
        if self.optimizer == "adam":
            return optim.adam(lr or self.lr, weight_decay=self.weight_decay)
        return optim.sgd(lr or self.lr, self.momentum, self.weight_decay)


def predict_model(nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
    """Return the outputs of `model`, such as logits (B, Y)."""
    if "model" not in nets.modules:
        raise MethodError(f"the method has nets {', '.join(nets.modules)} and no 'model'; override `predictors`")
    logits: Tensor = nets.model(x)
    return logits


def model_features(nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
    """Return the features of the body of `model`, (B, D)."""
    features: Tensor = nets.model.body(x)
    return features


def predict_with(net: str) -> Predictor:
    """Return a predictor that returns the outputs of the net `net`."""

    def predict(nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
        outputs: Tensor = getattr(nets, net)(x)
        return outputs

    return predict


def trains_of(phases: Iterable[Phase]) -> list[Train]:
    """Return every `Train` among the phases, including the members of each `Interleave`."""
    found: list[Train] = []
    for phase in phases:
        found += [phase] if isinstance(phase, Train) else list(phase.members) if isinstance(phase, Interleave) else []
    return found


def active_trains(phase: Phase, turn: Turn) -> list[Train]:
    """Return every `Train` of a phase that takes steps in this local update."""
    if not phase.works_in(turn) or isinstance(phase, Sweep | Set):
        return []
    members = (phase,) if isinstance(phase, Train) else phase.members
    return [train for train in members if train is phase or train.when is None or train.when(turn)]


def init_opts(phases: Iterable[Phase], weights: Weights) -> Tree:
    """Return the initial optimiser states that a client keeps between rounds, by phase."""
    return {
        train.name: train.optimizer.init(select(weights, train.params)["params"])
        for train in trains_of(phases)
        if train.keep_state
    }


def without(phases: Iterable[Phase], weights: Weights, frozen: Weights) -> tuple[Phase, ...]:
    """Return the phases, changed so that they do not train the tensors in `frozen`. A `Train` with nothing left to train is omitted.

    A net whose tensors are all frozen, including its running statistics, is in evaluation mode. `Sweep` and `Set` phases do not change.
    """
    free = {kind: [name for name in part if name not in frozen[kind]] for kind, part in weights.items()}
    nets = {name.partition(".")[0] for names in free.values() for name in names}

    def reduced(train: Train) -> Train:
        names = select(weights, train.params)["params"].keys() & set(free["params"])
        in_order = tuple(name for name in weights["params"] if name in names)
        return replace(train, params=in_order, train_mode=tuple(net for net in train.modes if net in nets))

    found: list[Phase] = []
    for phase in phases:
        if isinstance(phase, Sweep | Set):
            found.append(phase)
            continue
        members = [reduced(train) for train in trains_of([phase])]
        members = [train for train in members if train.params]
        if members:
            found.append(replace(phase, members=tuple(members)) if isinstance(phase, Interleave) else members[0])
    return tuple(found)
