"""Contents of `federation.toml`, of `node.toml`, and of the answer to a node that joins."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedloom.errors import ConfigError, suggest
from fedloom.ranges import Count, NonNegative, Positive, Whole

Port = Annotated[int, Field(ge=1, le=65535)]
MAX_FILE = 64 * 2**10  # maximum number of characters of a certificate or a request
M = TypeVar("M", bound=BaseModel)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FederationFile(_File):
    """Contents of `federation.toml`."""

    host: str
    port: Port
    superlink_port: Port
    listen: Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[0-9.]+):[0-9]{1,5}$")] | None = None
    deadline_s: Positive = 600.0
    late_s: Positive = 3600.0
    join_s: NonNegative = 120.0
    nodes: dict[str, list[Whole]]

    @property
    def address(self) -> str:
        """The address to which nodes connect."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Budget(_File):
    """The maximum cost of a run on a node. The node's owner sets these limits; requests that exceed them are refused."""

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


class JoinFile(_File):
    """The operator's answer to a node's request, with the certificates of the node and of the federation's authority (PEM)."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    server: Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$", max_length=300)]
    clients: Annotated[list[Whole], Field(min_length=1, max_length=4096)]
    authority: Annotated[str, Field(max_length=MAX_FILE)]
    certificate: Annotated[str, Field(max_length=MAX_FILE)]


def with_nodes(text: str, nodes: Mapping[str, Sequence[int]]) -> str:
    """Return the text of `federation.toml` with other nodes. All other lines and their comments are kept.

    Raises:
        ConfigError: the nodes are not in a table `[nodes]`.
    """
    lines = text.splitlines(keepends=True)
    start = next((n for n, line in enumerate(lines) if line.split("#")[0].strip() == "[nodes]"), None)
    if start is None:
        raise ConfigError("federation.toml: nodes: must be a table [nodes] with one line per node")
    rest = next((n for n in range(start + 1, len(lines)) if re.match(r"\s*\[[A-Za-z]", lines[n])), len(lines))
    keys = {name: name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name) for name in nodes}
    table = [f"{keys[name]} = {list(clients)}\n" for name, clients in nodes.items()]
    made = "".join([*lines[: start + 1], *table, *lines[rest:]])
    if tomllib.loads(made) != tomllib.loads(text) | {"nodes": {name: list(each) for name, each in nodes.items()}}:
        raise ConfigError("federation.toml: nodes: must be a table [nodes] with one line per node")
    return made


def read_file(path: Path, model: type[M], what: str) -> M:
    """Return the contents of a TOML file as a model. Raise ConfigError if the file is missing or invalid."""
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
