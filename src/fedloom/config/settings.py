"""Settings of an experiment, typed and validated. They have the same names in TOML files, `key=value` arguments and Python."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedloom.combining.rules import Rule, parse_rule
from fedloom.config.errors import explain
from fedloom.config.hints import near_keys
from fedloom.errors import ConfigError
from fedloom.methods.registry import METHODS, method_class
from fedloom.ranges import RAY_ADDRESS, Count, Fraction, NonNegative, Positive, Share, Whole
from fedloom.wire import transforms

if TYPE_CHECKING:
    from fedloom.method import Method

Values = dict[str, Any]
DEFAULT_CLIENTS = 10
NAMED = 5  # the most methods that a hint names
OWNERS_KNOWN = ("natural", "file", "own", "given")  # partitions that fix the number of clients


def comma_separated(text: str) -> tuple[str, ...]:
    """Return the words in a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Section(BaseModel):
    """A read-only table of settings. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Named(Section):
    """A table whose `name` selects a method or a model. The other keys are its options, which are checked when it is built."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> Values:
        """All keys except the name."""
        return dict(self.model_extra or {})


class DataSettings(Section):
    """The data set, and the conversion of its examples to model inputs."""

    name: str = "digits"
    """A known data set (see `fedloom list datasets`), any name if `data.path` is set, or `hub:OWNER/NAME[:CONFIG]` for a data set on the
    Hugging Face hub."""
    path: Path | None = None
    """Your own file or folder: a table (.csv, .tsv, also .gz, or .parquet), arrays (.npz, or a folder with x.npy and y.npy), a folder
    with train and test files (train.csv, test.csv; train.parquet, test.parquet), or images in folders named by class (docs/tasks.md).
    For `data=pfllib`, PFLlib's data folder."""
    task: Literal["classification", "multilabel", "regression", "language"] | None = None
    """Learning task of your own files. `regression` requires labels that are numbers; `multilabel` requires lists or columns of 0 and 1.
    By default, the label column of a table determines the task; for other data, it is classification. Folders of images need metadata.csv
    for other tasks. Named data sets have their own task."""
    owner: Literal["folder"] | None = None
    """With `folder`, the upper folders of your folder of images are domains (root/domain/class/picture). They become the column `domain`,
    by which `partition=natural` divides the examples. Default: the upper folders are classes."""
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    """Commit of the files of `data=hub:OWNER/NAME[:CONFIG]`. Default: the newest commit, which the run writes to its config.toml."""
    features: bool = False
    """For `data=har`, use the 561 published features of each window instead of its nine signals."""
    label: str | None = None
    """Label column of a table, or several columns, separated by commas (multilabel, regression). Default: the only column with a usual
    name, such as `label`, `class`, `target` or `y`."""
    text: tuple[str, ...] = ()
    """Column of a table that contains texts, or several columns, which are joined. The texts are then the only inputs,
    unless `data.columns` lists others."""
    tokens: Literal["words", "chars", "bytes", "basic-english"] | None = None
    """Tokens of texts: words, characters, bytes, or words by the rules of torchtext's `basic_english`. Default: words, or bytes for
    `data.task=language`."""
    case: Literal["lower", "keep"] | None = None
    """Whether letters of texts are converted to lower case. Default: `lower` for words, otherwise `keep`."""
    vocabulary: Count | Path | None = None
    """Maximum number of different tokens of texts, including 4 special ones; or a file with one word per line. Default: 10000."""
    min_count: Count | None = None
    """How often a token must occur in the training texts to be in the vocabulary. Default: 2, or 1 for characters."""
    length: Count | None = None
    """Number of tokens of a text. Longer texts are cut off at the end. Default: the 95th percentile of the training texts, at most 256.
    For `data.task=language`, the length of a block; default: 80."""
    classes: tuple[str, ...] = ()
    """The classes in the order of tables and reports, such as low,middle,high. Default: sorted by number or by name."""
    columns: tuple[str, ...] = ()
    """Input columns of a table, which may include columns that look like identifiers. Default: all other columns,
    or none with `data.text`."""
    drop: tuple[str, ...] = ()
    """Columns of a table that are not used."""
    split: str | None = None
    """Column of a table that contains the values train, valid and test. Default: a column with this name, if it contains these values."""
    missing: Literal["refuse", "drop", "fill"] = "refuse"
    """What to do if inputs of a table are missing: `refuse` the table, `drop` the rows, or `fill` the values. Numbers are filled with the
    training mean, and an additional column of 0 and 1 marks them; for categories, a missing value is a separate level."""
    missing_values: tuple[str, ...] = ()
    """Additional values of a table that mean a missing value, such as -9. The empty value and `?` always do; in columns of numbers, so do
    NA, N/A, NaN, nan, null and None."""
    decimal: Literal[".", ","] | None = None
    """Decimal separator of a table's numbers.

    The other one of `.` and `,` separates thousands. Default: `.`, without thousands separators.
    """
    encoding: str | None = None
    """Encoding of a table in a text file, such as latin-1. Default: UTF-8."""
    preprocess: Path | None = None
    """File that describes how raw values become inputs, written by `fedloom preprocess` or by an earlier run (preprocess.json). Columns,
    levels, vocabulary, scaling and classes are then taken from it, and data that do not match it are refused. Default: derived from the
    data."""
    rows: Count | None = None
    """Use only this many training examples, drawn once at random. Test examples are not affected. Default: all."""
    image_size: Count | None = None
    """Resize images to this width and height in pixels. Default: no resizing."""
    normalise: Literal["half", "standard", "own", "none"] | None = None
    """Normalisation of inputs. `half` maps images to [-1, 1]. `standard` results in mean 0 and standard deviation 1 per channel or
    feature, over the training examples of all clients; `own` does so over each client's own. `none` changes nothing. Default: standard
    for tables, half for images."""
    augment: str = "none"
    """Augmentation of training batches: `none`, `flip`, `crop-flip`, `resized-crop-flip` or `resized-crop-flip-once` (each example once,
    before training, including test examples)."""

    factor: Literal["code", "tint", "nuisance", "rotation"] | None = None
    """Add a known client factor to the images (docs/data.md). `code`: each client has its own code from classes to
    background colours. `tint`: one colour per client. `nuisance`: random colours. `rotation`: one angle per client. Default: none."""
    factor_clients: Annotated[int, Field(ge=2)] | None = None
    """Number of clients among which `data.factor` divides the training examples. Default: 4."""

    @field_validator("classes", "columns", "drop", "missing_values", "text", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return comma_separated(str(value)) if isinstance(value, str | int | float) else value


class PartitionSettings(Section):
    """The partition: how examples are divided among clients."""

    name: (
        Literal["iid", "dirichlet", "pathological", "extended", "quantity", "natural", "file", "own", "given"] | None
    ) = None
    """Partition scheme. Default: `own` if every owner's examples are split in time (texts, har), `natural` if a column names every owner,
    `dirichlet` if targets form groups, and `iid` otherwise; the run logs the scheme unless it is `dirichlet`. `natural` divides by the
    owner that a column names. `file` reads `partition.path`. `own` is the data set's own split of each owner's examples (PFLlib, LEAF,
    har). `given` is a partition passed from Python."""
    alpha: Positive = 0.1
    """Concentration parameter of the Dirichlet distribution. Smaller values give more skewed clients."""
    classes_per_client: Count = 2
    """Number of classes per client (pathological, extended)."""
    balance: bool = False
    """Split each class equally among its clients (pathological)."""
    by: str | None = None
    """Column whose values are used instead of classes (dirichlet, pathological, extended). By default, examples are grouped by target: by
    class, by the rarest label of each example, or by quantile bins of numbers."""
    bins: Annotated[int, Field(ge=2)] = 10
    """Number of quantile bins for targets that are numbers."""
    column: str | None = None
    """Column that names the owner of each example (natural). Default: the column of the known data set, or the only other column."""
    path: Path | None = None
    """Partition file, written by `fedloom partition` or by hand (file)."""
    min_examples: Count = 10
    """Minimum number of examples per client, before the split into training and test examples."""
    repair: bool = False
    """Use the first draw, and move examples from the largest clients to those with fewer than `min_examples`, instead of redrawing."""
    class_floor: Whole = 0
    """Minimum number of training examples of every class that each client has. Missing examples are moved from the clients with the most
    (dirichlet, pathological, extended)."""
    merge: bool = True
    """Pool the official training and test examples before the partition, as is usual in personalised federated learning. If false, only
    the training examples are divided among clients."""
    test_fraction: Fraction | None = None
    """Fraction of each client's examples that is held out as its test split. Default: 0.25, or 0 with `merge=false` (the official test set
    is then used)."""


class EvalSettings(Section):
    """The evaluation: what is scored, and how often."""

    general_every: Whole = 0
    """Score personal models on the common test set every N rounds. With 0, they are scored only after the last round."""
    clients: Count | None = None
    """Score only N clients, which are the same in every round. Default: all."""
    valid: Fraction = 0.0
    """Fraction of each client's training examples that is held out for validation."""
    fitted: bool = False
    """Also score each client's model in its state after its last local update."""
    shared_head: bool = False
    """Also fit one linear classifier for all clients on the features of the shared body, and score it whenever personal models are scored
    on the common test set (`shared_head_accuracy`). Each fit costs one pass over all training examples and an uplink of
    8 (D(D+1)/2 + D Y + Y) bytes from each client for D features and Y classes, which is reported as `shared_head_bytes`."""
    target: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Target value of the primary metric, such as 0.9 for accuracy. The summary reports the round in which personal models first reached
    it, and the number of bytes sent until then."""


class DeviceSettings(Section):
    """Simulated devices that drop out or are slow (docs/devices.md)."""

    dropout: Fraction = 0.0
    """Probability that a cohort member drops out of a round. It receives the downlink but does not train."""
    slow: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of slow clients. The same clients are slow in every round."""
    slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    """Factor by which a training step takes longer on a slow client."""
    stragglers: Literal["wait", "drop", "late", "partial"] = "wait"
    """What to do about slow clients: `wait` for them, `drop` their updates, aggregate them `late` in a later round, or let them run
    a `partial` update (1/slowdown of the steps)."""


class ScreenSettings(Section):
    """Screening of uplinks before aggregation (docs/devices.md)."""

    norm: NonNegative | None = None
    """Reject an uplink if one of its parts is more than this many times as large as the median client's, or if it has impossible
    statistics. Clients that are rejected repeatedly are excluded, and the server rolls back after a round without a valid uplink. 0 turns
    screening off. Default: 10 on devices, 0 in simulations."""
    max_share: Share | None = None
    """Maximum weight of a client in a mean over examples, as a fraction; at least 1/n for n uplinks. Default: 3/n if nodes have their own
    data, because the server cannot check their numbers of examples; otherwise 1."""


class PrivacySettings(Section):
    """Differential privacy of clients. The server clips the uplinks, adds them up, and adds noise (docs/security.md)."""

    noise: NonNegative | None = None
    """Noise multiplier: the standard deviation of the noise, in units of `privacy.clip`. Default: no privacy, unless `privacy.epsilon` is
    set."""
    epsilon: Positive | None = None
    """Privacy budget for an observer who does not know the cohorts. With `privacy.noise`, the run ends before the round that would exceed
    it. Otherwise, the noise is chosen such that all rounds together do not exceed it."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Probability with which the bound epsilon may fail. Default: 1 / N^1.1 for N clients."""
    clip: Positive = 1.0
    """Clipping norm: the maximum norm of a client's differences. Differences with a larger norm are clipped to it."""
    clips: dict[str, Positive] = {}
    """Clipping norms of the other parts of an uplink, such as `control` (SCAFFOLD), or `counts` and `sums` (FedProto). Default: 1 for
    `buffers` (running statistics). The norms of all other parts must be set."""
    adapt: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Adapt all clipping norms during the run such that this fraction of clients, for example 0.5, is not clipped.

    Default: fixed norms.
    """

    @property
    def on(self) -> bool:
        """Whether the run is private."""
        return self.noise is not None or self.epsilon is not None


class JoinSettings(Section):
    """Clients that join after training (docs/new-clients.md)."""

    clients: Whole = 0
    """Hold out the last N of the `clients` from training. They join after the last round and are scored separately."""
    turns: Count = 10
    """Number of local updates that each new client runs alone.

    They run the method's phases, but do not change the received shared weights.
    """


class ScheduleSettings(Section):
    """Schedule of the learning rates over rounds (docs/tuning.md). It applies to all learning rates of local updates, in addition to
    `method.lr_decay`."""

    name: Literal["constant", "step", "cosine"] = "constant"
    """`constant`; `step`: multiply the learning rate by `schedule.factor` after the rounds `schedule.at`, or after every `schedule.every`
    rounds; `cosine`: decrease it along half a cosine wave after the warm-up, down to `schedule.floor` after the last round."""
    warmup: Whole = 0
    """Number N of first rounds in which the learning rate rises in equal steps: 1/(N+1), 2/(N+1), ... of its value."""
    at: tuple[Count, ...] = ()
    """Rounds after which `step` decreases the learning rate, such as `50,75`."""
    every: Count | None = None
    """Number of rounds between decreases of the learning rate by `step`, instead of `schedule.at`."""
    factor: Share = 0.1
    """Factor by which `step` multiplies the learning rate."""
    floor: Fraction = 0.0
    """Fraction of the learning rate that remains at the end with `cosine`."""

    @field_validator("at", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        found = comma_separated(value) if isinstance(value, str) else value
        return (found,) if isinstance(found, int) else found


class StopSettings(Section):
    """Early stopping: the condition on which a run ends before its last round (docs/tuning.md)."""

    patience: Count | None = None
    """Number N of rounds without improvement after which the run ends: the primary metric on validation examples (`eval.valid`) is not
    better than its best value at least N rounds before. Default: the run does not end early."""
    after: Whole = 0
    """Round from which the rounds for `stop.patience` are counted."""


class EngineSettings(Section):
    """The engine, which runs the clients."""

    name: str = "auto"
    """`sequential`, `vectorised`, `processes`, `ray`, `auto`, or a wrapper (`debug`, `bytes`), which can be combined with an engine:
    `debug+sequential`."""
    threads: Count = 1
    """Number of torch threads in this process. If it is not 1, results depend on it. Worker processes always use one thread."""
    workers: Count | None = None
    """Number of worker processes (`processes`, `ray`). Default: one per core."""
    lanes: Count | None = None
    """Number of clients that are trained side by side in one batched operation. In `vectorised`, the default is as many as fit into
    memory, at most 64 (256 on a GPU). In each worker of `processes`, the default is one client at a time; for small models without
    convolutions, as many lanes as the worker has clients, or half as many, are twice as fast but change the last bits of the
    results."""
    device: str = "cpu"
    """Device on which clients are trained and scored (`sequential`, `vectorised`): `cpu`, `cuda` (the first GPU) or `cuda:N`. On a GPU,
    `auto` chooses `vectorised` (docs/gpu.md)."""
    device_bytes: Whole | None = None
    """GPU memory in bytes for data, and for client states between local updates. What does not fit stays on the host. Default: half of the
    free memory."""
    convolutions: Literal["grouped", "columns", "tuned"] = "grouped"
    """How `vectorised` computes convolutions: as `grouped` convolutions, as matrix products of `columns`, or `tuned`, which times both and
    uses the faster one (the last bits may differ from run to run)."""
    address: str | None = None
    """Ray cluster to join (`ray`): `auto` (the cluster of this machine), HOST:PORT or ray://HOST:PORT. Default: start a cluster on this
    machine."""
    deadline_s: Positive | None = None
    """Time limit in seconds, after which the round continues without clients that hang. With `processes`, it applies to each client's
    local update; with `ray`, to a worker's clients in a round, all of which are then skipped. Default: no limit."""

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
            raise ValueError("must be cpu, cuda or cuda:N")
        return value

    @field_validator("address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value not in (None, "auto") and not RAY_ADDRESS.fullmatch(str(value)):
            raise ValueError("must be auto, HOST:PORT or ray://HOST:PORT")
        return value


class Settings(Section):
    """All settings of one experiment."""

    method: Named = Named(name="fedavg")
    """Method (see `fedloom list methods`), or your own class, written `my.py:Mine`. Its hyper-parameters are `method.KEY`."""
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    clients: Count | None = None
    """Number of clients. Default: 10; with partition=natural, file, own or given, the partition determines it."""
    participation: float | str = 1.0
    """Fraction of the clients in each round, above 0 and at most 1. A range such as `0.1-1.0` draws a new fraction in each round."""
    cohort: Count | None = None
    """Number of clients in each round, instead of `participation`."""
    min_clients: Count = 1
    """Minimum number of uplinks for aggregation. If fewer uplinks arrive, the server keeps its weights, and the round is skipped."""
    rounds: Count = 20
    """Number of communication rounds."""
    batch_size: Count = 10
    """Number of examples per training batch."""
    drop_last: bool = False
    """Skip the last batch of each epoch if it is incomplete."""
    model: Named = Named(name="fedavg_cnn")
    """Architecture (see `fedloom list models`), or your own, written `my.py:Net`. Its options are `model.KEY`. Every model also has
    `model.weights=FILE.safetensors` (pretrained weights of the body), `model.lora=RANK` (low-rank adapters on a frozen body),
    `model.lora_alpha` and `model.lora_freeze_a` (docs/lora.md)."""
    models: tuple[str, ...] = ()
    """Several architectures instead of `model`, which are assigned to the clients in turn."""
    common_model: Named = Named(name="")
    """Architecture of the model that clients exchange in addition to their own model, for fml, fedkd, fedtype and fedmrl. Its options are
    `common_model.KEY`, as for `model`. Default: the clients' own architecture."""
    width: Count | None = None
    """Number of features that each model body returns. Default: determined by the architecture."""
    same_init: bool = True
    """Whether all clients start from the same weights."""
    eval_every: Count = 1
    """Score models every N rounds, and after the last round."""
    eval: EvalSettings = EvalSettings()
    devices: DeviceSettings = DeviceSettings()
    screen: ScreenSettings = ScreenSettings()
    privacy: PrivacySettings = PrivacySettings()
    join: JoinSettings = JoinSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    stop: StopSettings = StopSettings()
    engine: EngineSettings = EngineSettings()
    precision: Literal["fp32", "fp64", "bf16", "tf32"] = "fp32"
    """Number format of training and scoring. With `bf16` (or `tf32`, on a GPU only), matrix products use that format; losses, weights and
    updates stay in fp32. Results differ, and training is faster on hardware that supports the format."""
    seed: Whole = 0
    """Seed of all random numbers."""
    checkpoint_every: Whole = 10
    """Write a checkpoint every N rounds, and after the last round. With 0, write no checkpoints."""
    out: Path | None = None
    """Folder of the run. Default: a new folder in runs/."""
    label: str | None = None
    """Name of this run in tables and plots. Default: the name of the method."""
    uplink: tuple[str, ...] = ()
    """Transforms of the weights in uplinks (see `fedloom list transforms`), such as `topk:0.1,int8`. For another part of the message,
    write `PART/fp16`."""
    downlink: tuple[str, ...] = ()
    """Transforms of the weights in downlinks, such as `fp16`."""
    aggregate: str | None = None
    """Robust rule that combines the uplinks instead of their mean (see `fedloom list rules`), such as `trimmed:0.2`. It limits the
    influence of a minority of malicious clients (docs/security.md). Default: the method's mean."""
    log: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Experiment trackers that also receive the metrics. Each requires the fedloom extra with the same name."""

    @field_validator("models", "log", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return comma_separated(value) if isinstance(value, str) else value

    @field_validator("uplink", "downlink", mode="before")
    @classmethod
    def _transforms(cls, value: Any, info: ValidationInfo) -> Any:
        words = cls._split(value)
        if isinstance(words, list | tuple) and all(isinstance(word, str) for word in words):
            transforms.parse(words, str(info.field_name))
        return words

    @property
    def rule(self) -> Rule | None:
        """The robust rule that `aggregate` names, or None."""
        return parse_rule(self.aggregate) if self.aggregate else None

    @field_validator("aggregate")
    @classmethod
    def _aggregate(cls, value: str | None) -> str | None:
        if value is not None:
            parse_rule(value)
        return value

    @field_validator("out", mode="before")
    @classmethod
    def _out(cls, value: Any) -> Any:
        if value == "":  # Path("") would mean the current folder
            raise ValueError("must not be empty")
        return value

    @field_validator("participation")
    @classmethod
    def _participation(cls, value: float | str) -> float | str:
        low, high = participation_range(value)
        if not 0 < low <= high <= 1:
            raise ValueError(
                "must be above 0 and at most 1, or a range like 0.1-1.0; cohort=N sets the number of clients"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _clients(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("clients") is not None:
            return values
        partition = values.get("partition", PartitionSettings())
        name = partition.get("name") if isinstance(partition, Mapping) else getattr(partition, "name", partition)
        return values if name is None or name in OWNERS_KNOWN else {**values, "clients": DEFAULT_CLIENTS}

    @model_validator(mode="after")
    def _combinations(self) -> Settings:
        if self.clients is not None:
            check_cohort(self, self.clients)
        last = self.engine.name.rpartition("+")[2]
        for key, owners in (("address", ["ray"]), ("deadline_s", ["processes", "ray"])):
            value = getattr(self.engine, key)
            could = (
                [*owners, "auto", "debug", "bytes"] if "processes" in owners else owners
            )  # `auto` may choose processes
            if value is not None and last not in could:
                known = " and ".join(owners)
                raise ValueError(f"engine.{key}={value}: applies only to engine={known}, not engine={self.engine.name}")
        if self.engine.lanes is not None and last in ("sequential", "ray"):
            raise ValueError(
                f"engine.lanes={self.engine.lanes}: applies only to engine=processes and vectorised, not {last}"
            )
        if self.data.factor_clients is not None and self.data.factor is None:
            raise ValueError(
                f"data.factor_clients={self.data.factor_clients}: needs data.factor, such as data.factor=code"
            )
        _check_partition(self.partition)
        _check_device(self)
        _check_privacy(self.privacy)
        _check_schedule(self.schedule, self.rounds)
        if self.stop.after and self.stop.patience is None:
            raise ValueError(f"stop.after={self.stop.after}: has no effect without stop.patience; set it, too")
        return self


def with_scheme(settings: Settings, scheme: str) -> Settings:
    """Return the settings with a partition scheme, and with the default number of clients of this scheme.

    Raises:
        ValueError: another setting does not apply to the scheme.
    """
    partition = settings.partition.model_copy(update={"name": scheme})
    _check_partition(partition)
    clients = DEFAULT_CLIENTS if settings.clients is None and scheme not in OWNERS_KNOWN else settings.clients
    return settings.model_copy(update={"partition": partition, "clients": clients})


def _check_partition(partition: PartitionSettings) -> None:
    """Raise ValueError for a setting that the scheme does not use."""
    skewed = ("dirichlet", "pathological", "extended")
    for key, owners in (
        ("path", ("file",)),
        ("column", ("natural", "own")),
        ("by", skewed),
        ("repair", (*skewed, "quantity")),
        ("class_floor", skewed),
    ):
        value = getattr(partition, key)
        known = " and ".join(f"partition={name}" for name in owners)
        if value and partition.name is None and "dirichlet" not in owners:
            raise ValueError(f"partition.{key}={value}: applies only to {known}; set partition")
        if value and partition.name is not None and partition.name not in owners:
            raise ValueError(f"partition.{key}={value}: applies only to {known}, not partition={partition.name}")


def _check_device(settings: Settings) -> None:
    """Raise ValueError for settings that the engine or the CPU does not support."""
    engine = settings.engine
    last, on_gpu = engine.name.rpartition("+")[2], engine.device != "cpu"
    anyone = last in ("auto", "debug", "bytes")
    if on_gpu and not (anyone or last in ("sequential", "vectorised")):
        raise ValueError(f"engine.device={engine.device}: applies only to engine=sequential and vectorised, not {last}")
    if engine.convolutions != "grouped" and last != "vectorised" and not (anyone and on_gpu):
        raise ValueError(f"engine.convolutions={engine.convolutions}: applies only to engine=vectorised, not {last}")
    if engine.device_bytes is not None and not on_gpu:
        raise ValueError(f"engine.device_bytes={engine.device_bytes}: needs a GPU; set engine.device=cuda")
    if settings.precision == "tf32" and not on_gpu:
        raise ValueError("precision=tf32: needs a GPU; set engine.device=cuda")


def _check_privacy(privacy: PrivacySettings) -> None:
    """Raise ValueError for a setting that would have no effect."""
    for key in ("delta", "clip", "clips", "adapt"):
        if not privacy.on and getattr(privacy, key) != PrivacySettings.model_fields[key].default:
            raise ValueError(f"privacy.{key}: has no effect without privacy.noise or privacy.epsilon; set one of them")


def _check_schedule(schedule: ScheduleSettings, rounds: int) -> None:
    """Raise ValueError if a setting has no effect, or if a schedule is incomplete or does not fit into the rounds."""
    for key, owner in (("at", "step"), ("every", "step"), ("factor", "step"), ("floor", "cosine")):
        value = getattr(schedule, key)
        if value != ScheduleSettings.model_fields[key].default and schedule.name != owner:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"schedule.{key}={shown}: applies only to schedule={owner}, not schedule={schedule.name}")
    if schedule.name == "step" and bool(schedule.at) == bool(schedule.every):
        raise ValueError("schedule=step: needs either schedule.at, such as schedule.at=10,15, or schedule.every")
    if list(schedule.at) != sorted(set(schedule.at)):
        raise ValueError(f"schedule.at={','.join(map(str, schedule.at))}: must be rounds in increasing order")
    for key, last in (("warmup", schedule.warmup), ("at", max(schedule.at, default=0)), ("every", schedule.every or 0)):
        if last >= rounds:
            raise ValueError(f"schedule.{key}={last}: must be below rounds={rounds}")


def check_cohort(settings: Settings, n_clients: int) -> None:
    """Check that the cohort is not larger than the number of training clients, and that at least one client trains.

    Raises:
        ValueError: a setting is invalid; the message names its key.
    """
    joining = settings.join.clients
    if joining >= n_clients:
        raise ValueError(f"join.clients={joining}: there are only {n_clients} clients, and at least one must train")
    if settings.cohort is not None and settings.cohort > n_clients - joining:
        late = f", {joining} of which join after training" if joining else ""
        raise ValueError(f"cohort={settings.cohort}: there are only {n_clients} clients{late}")


def participation_range(value: float | str) -> tuple[float, float]:
    """Return the lowest and the highest fraction of clients in a round."""
    if isinstance(value, float):  # 1e-05 is not a range
        return value, value
    try:
        low, _, high = str(value).partition("-")
        return float(low), float(high or low)
    except ValueError:
        raise ValueError("must be a number, or a range like 0.1-1.0") from None


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Return validated settings. Options of `method` or `model` without a name apply to the default method or model.

    Raises:
        ConfigError: a setting is invalid; the message names the key, the value and the allowed values.
    """
    common = values.get("common_model")
    if isinstance(common, Mapping) and not common.get("name") and (options := common.keys() - {"name"}):
        raise ConfigError(f"common_model.{min(options)}: an option of a model that is not named; set common_model, too")
    defaults = {key: Settings.model_fields[key].default.name for key in ("method", "model")}
    named = {key: {"name": defaults[key], **v} for key, v in values.items() if key in defaults and isinstance(v, dict)}
    try:
        return Settings.model_validate({**values, **named})
    except ValidationError as error:
        raise ConfigError(explain(error, "", Settings)) from None


def make_method(choice: Named) -> Method:
    """Return the method named by `choice`, with its hyper-parameters."""
    cls = method_class(choice.name)
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in choice.options.keys() - fields:
        owners = [name for name, other in METHODS.items() if key in {field.name for field in dataclasses.fields(other)}]
        more = f" and {len(owners) - NAMED} more" if len(owners) > NAMED else ""
        have = f"; methods that have it: {', '.join(owners[:NAMED])}{more}"
        hint = have if owners else near_keys(f"method.{key}", fields)
        raise ConfigError(f"method.{key}: {choice.name} has no such hyper-parameter{hint}")
    try:
        return _adapter(cls).validate_python(choice.options)  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        raise ConfigError(explain(error, "method.", cls)) from None


@functools.lru_cache(maxsize=64)
def _adapter(cls: type[Method]) -> TypeAdapter[Method]:
    """Return the validator of a method's hyper-parameters, which takes longer to build than a small model."""
    return TypeAdapter(cls)


def to_toml(settings: Settings) -> str:
    """Return the settings as TOML text, which `read_toml` can read. Settings that are None and tables without a name are omitted."""
    values = settings.model_dump(mode="json", exclude_none=True)
    return tomli_w.dumps({key: value for key, value in values.items() if value != {"name": ""}})
