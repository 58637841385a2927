"""Contents of `federation.toml` and `node.toml`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedloom.errors import ConfigError, suggest
from fedloom.ranges import Count, NonNegative, Positive, Whole

Port = Annotated[int, Field(ge=1, le=65535)]
M = TypeVar("M", bound=BaseModel)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FederationFile(_File):
    """Contents of `federation.toml`."""

    host: str
    port: Port
    superlink_port: Port
    deadline_s: Positive = 600.0
    late_s: Positive = 3600.0
    join_s: NonNegative = 120.0
    nodes: dict[str, list[Whole]]

    @property
    def address(self) -> str:
        """Address that nodes connect to."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Budget(_File):
    """The most that a node spends on a run. Its owner sets these limits, and a request above one of them is refused."""

    message_mib: Positive = 512.0
    parameters: Count = 100_000_000
    steps: Count = 1_000_000
    seconds: Positive = 86_400.0
    rounds: Count = 100_000
    memory_mib: Count | None = None


class NodeFile(_File):
    """Contents of `node.toml`."""

    name: str
    server: str
    runtime_port: Port
    clients: list[Whole]
    data: str = "data"
    folders: list[str] = []
    budget: Budget = Budget()


def read_file(path: Path, model: type[M], what: str) -> M:
    """Read a TOML file into a model. Raise ConfigError if it is missing or invalid."""
    if not path.is_file():
        raise ConfigError(f"{path.parent} is not {what}: {path.name} is missing")
    try:
        return model.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = suggest(key, model.model_fields) if first["type"] == "extra_forbidden" else ""
        reason = "unknown key" if hint else first["msg"].lower()
        raise ConfigError(f"{path}: {key}: {reason}{hint}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
