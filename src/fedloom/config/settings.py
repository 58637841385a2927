"""Settings of an experiment: typed, validated, under the same names in TOML files, `key=value` words and Python."""

from __future__ import annotations

import dataclasses
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

from fedloom.config.errors import explain
from fedloom.errors import ConfigError, suggest
from fedloom.methods.registry import METHODS, method_class
from fedloom.ranges import RAY_ADDRESS, Count, Fraction, Positive, Share, Whole
from fedloom.wire import transforms

if TYPE_CHECKING:
    from fedloom.method import Method

Values = dict[str, Any]
DEFAULT_CLIENTS = 10
OWNERS_KNOWN = ("natural", "file", "own")  # partitions that say themselves how many clients there are


class Section(BaseModel):
    """A table of settings: read-only, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Named(Section):
    """A table whose `name` chooses something and whose other keys are options of what was chosen, checked there."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> Values:
        """Everything but the name."""
        return dict(self.model_extra or {})


class DataSettings(Section):
    """Where the rows come from and how they become inputs."""

    name: str = "digits"
    """A known data set (`fedloom list datasets`), or any name together with `data.path`."""
    path: Path | None = None
    """A folder of parquet files (train.parquet, test.parquet), or PFLlib's folder for `data=pfllib`."""
    rows: Count | None = None
    """Take only so many of the training rows, drawn once at random; test rows all stay."""
    image_size: Count | None = None
    """Resize images to this many pixels a side."""
    normalise: Literal["half", "standard", "none"] | None = None
    """`half`: pictures to [-1, 1]; `standard`: mean 0 and deviation 1 per channel; `none`: as they are; default: half for pictures."""
    augment: str = "none"
    """How training batches are augmented: `none`, `flip`, `crop-flip`, `resized-crop-flip`, `resized-crop-flip-once` (every row
    once, before training; test rows too)."""


class PartitionSettings(Section):
    """How rows are dealt to clients."""

    name: Literal["iid", "dirichlet", "pathological", "extended", "quantity", "natural", "file", "own"] = "dirichlet"
    """The scheme; `own` is the split that a PFLlib folder brings along."""
    alpha: Positive = 0.1
    """Concentration of the Dirichlet schemes: small is skewed."""
    classes_per_client: Count = 2
    """Classes a client holds (pathological, extended)."""
    balance: bool = False
    """Equal shares of a class (pathological)."""
    column: str | None = None
    """The column that names a row's owner (natural); default: a known data set's, else the only one."""
    path: Path | None = None
    """A partition written by `fedloom partition` or by hand (file)."""
    min_examples: Count = 10
    """Rows that every client must have, before its split into training and test rows."""
    merge: bool = True
    """Deal official training and test rows together (the custom in personalised federated learning), or the training rows alone."""
    test_fraction: Fraction | None = None
    """The part of a client's rows that is its own test split; default: 0.25, and 0 (the official test set) with `merge=false`."""


class EvalSettings(Section):
    """What is scored, and how often."""

    general_every: Whole = 0
    """Score personal models on the common rows every so many rounds; 0: only after the last."""
    clients: Count | None = None
    """Score a fixed sample of so many clients; default: all."""
    valid: Fraction = 0.0
    """The part of the training rows set aside for validation."""
    fitted: bool = False
    """Also score models as their client's last turn left them."""
    target: Share | None = None
    """An accuracy: the summary tells after which round, and how many bytes, personal models first reached it."""


class DeviceSettings(Section):
    """Simulated devices that are lost or slow (docs/devices.md)."""

    dropout: Fraction = 0.0
    """The chance that a member of a round's cohort is lost: it is sent the downlink, and does no work."""
    slow: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The part of the clients that are slow, the same ones in all rounds."""
    slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    """How many times longer a slow client takes for a step."""
    stragglers: Literal["wait", "drop", "late", "partial"] = "wait"
    """What becomes of slow turns: `wait` for them, `drop` them, let them in `late`, or do a `partial` one (1/slowdown of the steps)."""


class JoinSettings(Section):
    """Clients that come when training is over (docs/new-clients.md)."""

    clients: Whole = 0
    """The last so many of the `clients` take no part in training; after the last round they join, and are scored by themselves."""
    turns: Count = 10
    """Turns that a newcomer takes by itself: the method's phases, with all that travels left as it was received."""


class EngineSettings(Section):
    """What runs the clients."""

    name: str = "auto"
    """`sequential`, `vectorised`, `processes`, `ray`, `auto`, or a wrapper (`debug`, `bytes`), also joined: `debug+sequential`."""
    threads: Count = 1
    """Threads of torch in this process; with more than one, numbers depend on how many. Worker processes always have one."""
    workers: Count | None = None
    """Worker processes (`processes`, `ray`); default: one per core."""
    lanes: Count | None = None
    """Clients side by side, in `vectorised` (default: as many as memory allows, 64 at most, 256 on a GPU) or in each worker of `processes`
    (default: one after another; for small models without convolutions a worker's whole part of the cohort, or half of it, is twice as fast,
    and changes the last bits)."""
    device: str = "cpu"
    """Where clients are trained and scored, in `sequential` and `vectorised`: `cpu`, `cuda` (the first GPU) or `cuda:N`. With a GPU
    `auto` is `vectorised` (docs/gpu.md)."""
    device_bytes: Whole | None = None
    """Bytes of the GPU's memory for data and clients' states between turns; what does not fit waits on the host; default: half of what
    is free."""
    convolutions: Literal["grouped", "columns", "tuned"] = "grouped"
    """How `vectorised` computes convolutions: `grouped`, as matrix products of `columns`, or the faster of the two (`tuned`: times them,
    so the last bits may differ from run to run)."""
    address: str | None = None
    """The Ray cluster to join (`ray`): `auto` (the one that this machine is in), HOST:PORT or ray://HOST:PORT; default: start one here."""
    deadline_s: Positive | None = None
    """Seconds that a worker has for its share of a round before the round goes on without it (`ray`); default: no limit."""

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
    """One experiment."""

    method: Named = Named(name="fedavg")
    """The method (`fedloom list methods`) or `my.py:Mine`; its hyper-parameters are `method.KEY`."""
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    clients: Count | None = None
    """Number of clients; default: 10, or as many as there are with partition=natural, file or own."""
    participation: float | str = 1.0
    """Part of the clients in a round, above 0 and at most 1; `0.1-1.0` draws it anew in every round."""
    cohort: Count | None = None
    """Number of clients in a round, in place of `participation`."""
    min_clients: Count = 1
    """A round in which fewer uplinks arrive is skipped: the server stays as it was."""
    rounds: Count = 20
    """Communication rounds."""
    batch_size: Count = 10
    """Rows in a training batch."""
    drop_last: bool = False
    """Leave out the incomplete last batch of an epoch."""
    model: Named = Named(name="fedavg_cnn")
    """The architecture (`fedloom list models`) or `my.py:Net`; its options are `model.KEY`."""
    models: tuple[str, ...] = ()
    """Several architectures, dealt to the clients in turn, in place of `model`."""
    width: Count | None = None
    """Features that every body gives; default: the architecture's own."""
    same_init: bool = True
    """Whether clients start from equal weights."""
    eval_every: Count = 1
    """Score every so many rounds (and after the last)."""
    eval: EvalSettings = EvalSettings()
    devices: DeviceSettings = DeviceSettings()
    join: JoinSettings = JoinSettings()
    engine: EngineSettings = EngineSettings()
    precision: Literal["fp32", "fp64", "bf16", "tf32"] = "fp32"
    """Arithmetic of training and scoring; `bf16`, and on a GPU `tf32`: products in that, losses, weights and updates in fp32 (other
    numbers; faster where the machine has such arithmetic)."""
    seed: Whole = 0
    """Everything random follows from this number."""
    checkpoint_every: Whole = 10
    """Write a checkpoint every so many rounds (and after the last); 0: never."""
    out: Path | None = None
    """The run's folder; default: a new one under runs/."""
    label: str | None = None
    """What tables and plots call this run; default: its method's name."""
    uplink: tuple[str, ...] = ()
    """What becomes of the weights in uplinks (`fedloom list transforms`), such as `topk:0.1,int8`; of another part: `PART/fp16`."""
    downlink: tuple[str, ...] = ()
    """What becomes of the weights in downlinks, such as `fp16`."""
    log: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where metrics also go (extras of the same names)."""

    @field_validator("models", "log", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("uplink", "downlink", mode="before")
    @classmethod
    def _transforms(cls, value: Any, info: ValidationInfo) -> Any:
        words = cls._split(value)
        if isinstance(words, list | tuple) and all(isinstance(word, str) for word in words):
            transforms.parse(words, str(info.field_name))
        return words

    @field_validator("out", mode="before")
    @classmethod
    def _out(cls, value: Any) -> Any:
        if value == "":  # a path would take it for the current folder
            raise ValueError("must not be empty")
        return value

    @field_validator("participation")
    @classmethod
    def _participation(cls, value: float | str) -> float | str:
        low, high = participation_range(value)
        if not 0 < low <= high <= 1:
            raise ValueError("must be above 0 and at most 1, or a range like 0.1-1.0")
        return value

    @model_validator(mode="before")
    @classmethod
    def _clients(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("clients") is not None:
            return values
        partition = values.get("partition", PartitionSettings())
        name = partition.get("name") if isinstance(partition, Mapping) else getattr(partition, "name", partition)
        return values if name in OWNERS_KNOWN else {**values, "clients": DEFAULT_CLIENTS}

    @model_validator(mode="after")
    def _combinations(self) -> Settings:
        if self.clients is not None:
            check_cohort(self, self.clients)
        last = self.engine.name.rpartition("+")[2]
        for key in ("address", "deadline_s"):
            value = getattr(self.engine, key)
            if value is not None and last != "ray":
                raise ValueError(f"engine.{key}={value}: only engine=ray has it, not engine={self.engine.name}")
        if self.engine.lanes is not None and last in ("sequential", "ray"):
            raise ValueError(
                f"engine.lanes={self.engine.lanes}: only processes and vectorised have it, not engine={last}"
            )
        _check_partition(self.partition)
        _check_device(self)
        return self


def _check_partition(partition: PartitionSettings) -> None:
    """Raise ValueError for a file or a column that the scheme does not look at."""
    for key, owners in (("path", ("file",)), ("column", ("natural", "own"))):
        value = getattr(partition, key)
        if value is not None and partition.name not in owners:
            known = " and ".join(f"partition={name}" for name in owners)
            raise ValueError(f"partition.{key}={value}: is for {known}, not partition={partition.name}")


def _check_device(settings: Settings) -> None:
    """Raise ValueError for what the engine, or a CPU, does not have."""
    engine = settings.engine
    last, on_gpu = engine.name.rpartition("+")[2], engine.device != "cpu"
    anyone = last in ("auto", "debug", "bytes")
    if on_gpu and not (anyone or last in ("sequential", "vectorised")):
        raise ValueError(f"engine.device={engine.device}: only sequential and vectorised have it, not engine={last}")
    if engine.convolutions != "grouped" and last != "vectorised" and not (anyone and on_gpu):
        raise ValueError(f"engine.convolutions={engine.convolutions}: only engine=vectorised has it, not engine={last}")
    if engine.device_bytes is not None and not on_gpu:
        raise ValueError(f"engine.device_bytes={engine.device_bytes}: only a GPU has it (engine.device=cuda)")
    if settings.precision == "tf32" and not on_gpu:
        raise ValueError("precision=tf32: only a GPU has it (engine.device=cuda)")


def check_cohort(settings: Settings, n_clients: int) -> None:
    """Refuse more clients in a round than there are, and a federation of newcomers alone.

    Raises:
        ValueError: one line that names the key.
    """
    joining = settings.join.clients
    if joining >= n_clients:
        raise ValueError(f"join.clients={joining}: there are only {n_clients} clients, and somebody must train")
    if settings.cohort is not None and settings.cohort > n_clients - joining:
        late = f", of whom {joining} join after training" if joining else ""
        raise ValueError(f"cohort={settings.cohort}: there are only {n_clients} clients{late}")


def participation_range(value: float | str) -> tuple[float, float]:
    """The least and the greatest part of the clients in a round."""
    if isinstance(value, float):  # 1e-05 is no range
        return value, value
    try:
        low, _, high = str(value).partition("-")
        return float(low), float(high or low)
    except ValueError:
        raise ValueError("must be a number, or a range like 0.1-1.0") from None


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Validated settings; `method.lr=0.1` without a `method` is meant for the default one (`model` likewise).

    Raises:
        ConfigError: one line that names the key, the value and what is allowed.
    """
    defaults = {key: Settings.model_fields[key].default.name for key in ("method", "model")}
    named = {key: {"name": defaults[key], **v} for key, v in values.items() if key in defaults and isinstance(v, dict)}
    try:
        return Settings.model_validate({**values, **named})
    except ValidationError as error:
        raise ConfigError(explain(error, "", Settings)) from None


def make_method(choice: Named) -> Method:
    """The method that `method.name` and the other keys of that table describe."""
    cls = method_class(choice.name)
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in choice.options.keys() - fields:
        owners = [name for name, other in METHODS.items() if key in {field.name for field in dataclasses.fields(other)}]
        have = f"; {', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it"
        hint = have if 0 < len(owners) < 5 else suggest(key, fields)
        raise ConfigError(f"method.{key}: {choice.name} has no such hyper-parameter{hint}")
    try:
        return TypeAdapter(cls).validate_python(choice.options)
    except ValidationError as error:
        raise ConfigError(explain(error, "method.", cls)) from None


def to_toml(settings: Settings) -> str:
    """The settings as a TOML file that `values.read_toml` reads back; what is None is left out."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))
