"""The folder of a deployed federation: its nodes, keys and certificates, the app bundle, commands and service units.

::

    federation.toml   addresses, deadlines, and the clients of each node
    config.toml       settings of the experiment, as for `fedloom run`
    server/           for the server: certificate, key, app/ (the bundle), fedloom-server.service, and
        keys/         public keys of the nodes; keys that are no longer valid are in revoked/
        audit.jsonl   a record of nodes that were admitted, revoked or given a new key
    node-0/ ...       for the device: node.toml, its private key, the authority's certificate, fedloom-node.service
    authority/        key of the authority. Keep it offline; it is required to admit nodes and to renew the server's certificate
    README.md         instructions
"""

from __future__ import annotations

import getpass
import ipaddress
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from fedloom.config.parsing import read_toml
from fedloom.config.settings import Named, Settings, make_method, make_settings, to_toml, with_scheme
from fedloom.deploy import texts
from fedloom.deploy.audit import AuditLog
from fedloom.deploy.certificates import (
    WARN,
    Identity,
    certificate_bytes,
    expiry,
    fingerprint_of,
    key_bytes,
    new_authority,
    new_node_key,
    new_server,
    node_key_bytes,
    write_new,
)
from fedloom.deploy.files import FederationFile, NodeFile, read_file
from fedloom.deploy.node_keys import read_key
from fedloom.deploy.services import private_files
from fedloom.errors import ConfigError
from fedloom.experiment.exclusions import refuse_exclusions

HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?")
SCREEN_NORM = 10.0  # default for screen.norm on devices
LOOPBACK = ("127.0.0.1", "localhost")
REVOKED = "revoked"  # folder of keys that are no longer valid, named NAME-FINGERPRINT.pub


class Deployment:
    """The folder of a federation on the server."""

    def __init__(self, path: Path) -> None:
        """Open the folder. Raise ConfigError if it is not the folder of a federation, or is incomplete."""
        self.path = path
        self.server = path / "server"
        self.file = read_file(path / "federation.toml", FederationFile, "a federation's folder")
        _check_roster(path, self.file.nodes)
        missing = [self.public_key(node) for node in self.file.nodes if node not in self.revoked()]
        for file in (self.server / "ca.crt", self.server / "runtime.secret", *missing):
            if not os.access(file, os.R_OK):
                raise ConfigError(f"{file} is missing or not readable by this user; the server needs it")

    def revoked(self) -> list[str]:
        """Return the nodes whose keys were revoked, and whose clients are on no other node."""
        old = {file.stem.rpartition("-")[0] for file in (self.server / REVOKED).glob("*.pub")}
        return [node for node in self.file.nodes if node in old and not self.public_key(node).is_file()]

    def active(self) -> list[str]:
        """Return the nodes that have a key."""
        revoked = self.revoked()
        return [node for node in self.file.nodes if node not in revoked]

    def expiring(self) -> list[str]:
        """Return warnings about certificates and keys that expire soon. Raise ConfigError if the server's certificate has expired."""
        own = expiry(self.server / "server.crt", f"fedloom deploy rotate {self.path} server")
        now, keys = datetime.now(UTC), [read_key(self.public_key(node)) for node in self.active()]
        soon = [key for key in keys if not key.is_valid(now + WARN)]
        return [
            *([own] if own else []),
            *(
                f"{key.node}: its key expires on {key.until:%Y-%m-%d}; renew it with fedloom deploy rotate"
                for key in soon
            ),
        ]

    def check_complete(self) -> None:
        """Raise ConfigError if a client is not on any node."""
        every = {i for clients in self.file.nodes.values() for i in clients}
        if missing := sorted(set(range(max(every, default=0) + 1)) - every):
            raise ConfigError(
                f"{self.path}: client {missing[0]} is on no node; admit one with: "
                f"fedloom deploy admit {self.path} REQUEST --clients {','.join(map(str, missing))}"
            )

    @property
    def superlink(self) -> str:
        """The address of the SuperLink, which is reachable only on the server itself."""
        return f"127.0.0.1:{self.file.superlink_port}"

    @property
    def door(self) -> tuple[str, str, int]:
        """The address on which the proxy listens, the address by which this machine connects to it, and its port."""
        if self.file.listen is None:
            return *proxy_hosts(self.file.host), self.file.port
        host, _, port = self.file.listen.rpartition(":")
        return *proxy_hosts(host.strip("[]")), int(port)

    @property
    def n_clients(self) -> int:
        """The number of clients on all nodes."""
        return sum(map(len, self.file.nodes.values()))

    def public_key(self, node: str) -> Path:
        """Return the file that contains a node's public key."""
        return self.server / "keys" / f"{node}.pub"

    def write_flwr_config(self) -> None:
        """Write the config of Flower's own commands, with the current port and certificate file of the SuperLink."""
        file = self.server / "flwr/config.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(texts.flwr_config(self.superlink, self.server / "ca.crt"), encoding="utf-8")


def create_deployment(
    path: Path,
    values: Mapping[str, Any],
    n_nodes: int,
    hosts: Sequence[str] = LOOPBACK,
    ports: Mapping[str, int] | None = None,
    runtime: Sequence[int] = (),
    *,
    demo: bool = False,
    nginx: bool = False,
) -> Deployment:
    """Write the folder of a new federation, which only its owner can read.

    Args:
        values: tables of the experiment's settings. Its clients are divided among the nodes as evenly as possible.
        n_nodes: number of nodes whose keys are created here. With 0, all nodes join by requests.
        hosts: host names or addresses of the server. Nodes connect to the first one.
        ports: `proxy` and `superlink`; default: 9092 and 9091.
        runtime: a port for the processes of each node; default: 9094, because each node is on a separate machine.
        demo: the nodes use the examples that the config assigns to their clients, instead of their own.
        nginx: write a config for nginx in front of the proxy, which then listens on the next port of the loopback interface.

    Raises:
        ConfigError: the folder is not empty, or a value is invalid.
    """
    settings = deployable(make_settings(values))
    check_plan(settings, n_nodes, hosts)
    ports = {"proxy": 9092, "superlink": 9091, **(ports or {})}
    nodes = _clients_by_node(settings.clients or n_nodes, n_nodes)
    listen = f"127.0.0.1:{ports['proxy'] + 1}" if nginx else None
    federation = FederationFile(
        host=hosts[0], port=ports["proxy"], superlink_port=ports["superlink"], listen=listen, nodes=nodes
    )
    data: dict[str, Any] = {"data": "config", "folders": named_paths(settings)} if demo else {}
    with private_files():
        make_empty(path)
        authority = new_authority()
        write_new(path / "federation.toml", texts.FEDERATION + tomli_w.dumps(federation.model_dump(exclude_none=True)))
        if listen:
            conf = texts.nginx_conf(path.resolve(), ports["proxy"], listen, settings.clients or 0)
            write_new(path / "server/fedloom-nginx.conf", conf)
        write_new(path / "config.toml", to_toml(settings))
        write_new(path / "authority/ca.key", key_bytes(authority.key))
        write_new(path / "authority/ca.crt", certificate_bytes(authority))
        _write_server(path, authority, hosts)
        audit = AuditLog.of(path)
        audit.append("create", "", fingerprint_of(authority.certificate.public_key()))  # type: ignore[arg-type]
        for place, (name, clients) in enumerate(nodes.items()):
            port = runtime[place] if runtime else 9094
            node = NodeFile(name=name, server=federation.address, runtime_port=port, clients=clients, **data)
            key = _write_node(path, authority, node, code_files(settings))
            audit.append("admit", name, fingerprint_of(key), clients=clients)
        made = Deployment(path)
        made.write_flwr_config()
        write_new(path / "README.md", texts.readme(made.file, path.resolve().name))
    return made


def _write_server(path: Path, authority: Identity, hosts: Sequence[str]) -> None:
    """Write the server's part of the folder, except for the nodes' public keys."""
    server, folder = new_server(authority, list(dict.fromkeys([*hosts, *LOOPBACK]))), path / "server"
    write_new(folder / "ca.crt", certificate_bytes(authority))
    write_new(folder / "server.crt", certificate_bytes(server))
    write_new(folder / "server.key", key_bytes(server.key))
    write_new(folder / "runtime.secret", secrets.token_hex(32))
    write_new(folder / "app/pyproject.toml", texts.APP_PROJECT)
    write_new(folder / "app/fedloom_app.py", texts.APP_CODE)
    write_new(folder / "fedloom-server.service", texts.server_unit(path.resolve(), sys.executable, getpass.getuser()))


def _write_node(path: Path, authority: Identity, node: NodeFile, code: Sequence[Path]) -> EllipticCurvePublicKey:
    """Write a node's folder, and write the node's public key for the server. Return the key."""
    folder, key = path / node.name, new_node_key()
    private, public = node_key_bytes(key)
    write_new(folder / "node.toml", texts.NODE + tomli_w.dumps(node.model_dump(exclude_none=True)))
    write_new(folder / "node.key", private)
    write_new(path / f"server/keys/{node.name}.pub", public)
    write_new(folder / "ca.crt", certificate_bytes(authority))
    write_new(folder / "runtime.secret", secrets.token_hex(32))
    write_new(folder / "fedloom-node.service", texts.node_unit(node.name, Path("/etc/fedloom") / node.name))
    for file in code:
        write_new(folder / "code" / file.name, file.read_bytes())
    return key.public_key()


def make_empty(path: Path) -> None:
    """Create a folder that only its owner can read, or use an existing empty folder. Raise ConfigError if it is not empty."""
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        if not taken:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; choose another folder") from None
    if taken:
        raise ConfigError(f"{path}: exists and is not empty; choose another folder")


def deployable(settings: Settings) -> Settings:
    """Return the settings for a run on devices. Raise ConfigError if they cannot be deployed."""
    if settings.checkpoint_every < 1:
        raise ConfigError("checkpoint_every=0: a deployed run must be resumable; use 1 or more")
    if settings.engine.name not in ("auto", "flower"):
        raise ConfigError(
            f"engine={settings.engine.name}: a federation on devices always uses its own engine; remove this setting"
        )
    method, name = make_method(settings.method), settings.method.name
    if method.exchanges:
        raise ConfigError(
            f"method={name}: cannot be deployed, because its clients exchange parts of their uplinks and devices connect only to the server"
        )
    refuse_exclusions(settings, method)
    if settings.privacy.on:
        raise ConfigError("privacy: cannot be deployed yet, because nodes have the seed, from which the noise follows")
    if method.pooled:
        raise ConfigError(f"method={name}: cannot be deployed, because it pools the examples of all clients")
    if settings.join.clients:
        raise ConfigError("join.clients: clients cannot join later on devices; include them in `clients` of a new run")
    if settings.eval.shared_head:
        raise ConfigError("eval.shared_head=true: devices do not send sums of features yet; remove eval.shared_head")
    if settings.data.factor:
        raise ConfigError(f"data.factor={settings.data.factor}: devices have their own data; remove data.factor")
    engine = settings.engine.model_copy(update={"name": "flower"})
    settings = settings if settings.partition.name else with_scheme(settings, "dirichlet")  # data are not loaded yet
    screen = settings.screen
    screen = screen.model_copy(update={"norm": SCREEN_NORM}) if screen.norm is None else screen
    return settings.model_copy(update={"engine": engine, "screen": screen})


def read_config(path: Path) -> dict[str, Any]:
    """Return the tables of a federation's `config.toml`."""
    return read_toml(path / "config.toml")


def code_files(settings: Settings) -> list[Path]:
    """Return the files that the settings name: Python files (`my.py:Mine`) and `model.weights`. Nodes store them in one folder, `code`.

    Raises:
        ConfigError: a file is missing, or two files have the same name.
    """
    choices = {"model": settings.model, "common_model": settings.common_model}
    names = [("method", settings.method.name), *((key, choice.name) for key, choice in choices.items())]
    names += [("models", name) for name in settings.models]
    files = [(f"{key}={name}", Path(name.rpartition(":")[0])) for key, name in names if ":" in name]
    for key, choice in choices.items():
        if weights := weights_file(choice):
            files.append((f"{key}.weights={weights}", weights))
    found: dict[str, Path] = {}
    for given, file in files:
        if not file.is_file():
            raise ConfigError(f"{given}: file {file} does not exist")
        if found.setdefault(file.name, file).resolve() != file.resolve():
            raise ConfigError(
                f"{found[file.name]} and {file}: file names must differ, because nodes keep these files in one folder; rename one"
            )
    return list(found.values())


def weights_file(model: Named) -> Path | None:
    """Return the file with a model's pretrained weights if its settings name one."""
    weights = model.options.get("weights")
    return Path(weights) if isinstance(weights, str) and weights.endswith(".safetensors") else None


def proxy_hosts(host: str) -> tuple[str, str]:
    """Return the address on which the proxy of `host` listens, and the address by which this machine connects to it."""
    if host == "localhost":
        return "127.0.0.1", "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "0.0.0.0", "127.0.0.1"
    if address.is_loopback:
        return host, host
    return ("0.0.0.0", "127.0.0.1") if address.version == 4 else ("::", "::1")


def named_paths(settings: Settings) -> list[str]:
    """Return the absolute paths of the files and folders of examples that the settings name."""
    return [str(path.resolve()) for path in (settings.data.path, settings.partition.path) if path]


def check_plan(settings: Settings, n_nodes: int, hosts: Sequence[str] = LOOPBACK) -> None:
    """Raise ConfigError if the plan cannot be deployed. Call this function before anything is written or started."""
    if settings.clients is None:
        raise ConfigError(
            "clients: set the number of clients; with partition=natural, file or own it is not known in advance"
        )
    if not 0 <= n_nodes <= settings.clients:
        raise ConfigError(
            f"--nodes {n_nodes}: must be from 1 to the number of clients ({settings.clients}), or 0 if all nodes will join"
        )
    check_hosts(hosts)
    code_files(settings)


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise ConfigError if an entry is neither a host name nor an address."""
    for host in hosts:
        if not HOST.fullmatch(host) and not is_ipv6(host):
            raise ConfigError(f"--address {host}: must be a host name or an IP address, without a port")


def is_ipv6(host: str) -> bool:
    """Return whether `host` is an IPv6 address with the same meaning on all machines (unlike `fe80::1%eth0`)."""
    try:
        return ipaddress.ip_address(host).version == 6 and "%" not in host
    except ValueError:
        return False


def _check_roster(path: Path, nodes: Mapping[str, Sequence[int]]) -> None:
    every = sorted(i for clients in nodes.values() for i in clients)
    if len(set(every)) < len(every) or not all(nodes.values()):
        raise ConfigError(
            f"{path / 'federation.toml'}: nodes: each client must be on one node, and each node must have one; found {every}"
        )


def _clients_by_node(clients: int, n_nodes: int) -> dict[str, list[int]]:
    bounds = [clients * k // max(n_nodes, 1) for k in range(n_nodes + 1)]
    return {f"node-{k}": list(range(bounds[k], bounds[k + 1])) for k in range(n_nodes)}
