"""The text of the files in a federation's folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import tomli_w

FEDERATION = """\
# host, port: where nodes reach this federation (the proxy; open this port in the firewall, no other).
# superlink_port: Flower's SuperLink, which listens on 127.0.0.1 alone.
# deadline_s: how long a round waits for its nodes; join_s: how long a run waits at its start for nodes that are missing.
# late_s: with devices.stragglers=late, how long after deadline_s an answer may come, to count in a later round.
# nodes: which clients each node holds; every client from 0 to K - 1 is on one node.

"""

NODE = """\
# server: the federation's address.  runtime_port: for this node's own processes, on 127.0.0.1 alone.
# clients: their numbers in the federation, as in the server's federation.toml.
# data: a folder with this device's rows (train.parquet, test.parquet; or pictures in folders named by class; with several clients a
#       folder client-<number> each), or "config": the rows that the run's config deals to these clients (for tests on one machine).

"""

APP_PROJECT = """\
# Flower starts a run by naming a bundle. This one holds no code that runs: nodes and server bring fedloom along, and never execute it.
[project]
name = "fedloom-app"
version = "1.0.0"
description = "A placeholder: fedloom's nodes and server run their own installed code."
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.43"]

[tool.flwr.app]
publisher = "fedloom"

[tool.flwr.app.components]
serverapp = "fedloom_app:server"
clientapp = "fedloom_app:client"

[tool.flwr.app.config]
"""

APP_CODE = '''\
"""Placeholders that Flower's bundle must name. They are never executed: see docs/deployment.md of fedloom."""

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()
'''

_UNIT = """\
# cp {file} /etc/systemd/system/ && systemctl daemon-reload && systemctl enable --now {name}
[Unit]
Description={what}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
# it runs as root, unless a user is named here, who must own {folder}
# User=fedloom
ExecStart={command}
Restart=always
RestartSec=5
# systemd 254 and newer: 5 s at first, a minute in the end; older ones say that they do not know these, and wait 5 s each time
RestartSteps=6
RestartMaxDelaySec=60
KillMode=control-group
KillSignal=SIGTERM
TimeoutStopSec=20
NoNewPrivileges=true
ProtectSystem=strict
ReadWritePaths={folder}
PrivateTmp=true

[Install]
WantedBy=multi-user.target
"""


def server_unit(folder: Path, python: str) -> str:
    """The server's systemd unit."""
    place = _unit_word(folder)
    command = f"{_unit_word(python)} -m fedloom.cli deploy server {place.replace('$', '$$')}"
    return _UNIT.format(
        file="fedloom-server.service", name="fedloom-server", what="fedloom: SuperLink and proxy of a federation",
        command=command, folder=place,
    )  # fmt: skip


def node_unit(name: str) -> str:
    """A node's systemd unit, for a device that has fedloom in /opt/fedloom and the node's folder in /etc/fedloom."""
    folder = f"/etc/fedloom/{name}"
    return _UNIT.format(
        file="fedloom-node.service", name="fedloom-node", what=f"fedloom: {name} of a federation",
        command=f"/opt/fedloom/bin/fedloom deploy node {folder}", folder=folder,
    )  # fmt: skip


def _unit_word(path: Path | str) -> str:
    """A path as one word of a unit's line."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'


def flwr_config(superlink: str, ca: Path) -> str:
    """Flower's own config, which says where the SuperLink is."""
    here = {"address": superlink, "root-certificates": str(ca.resolve())}
    return tomli_w.dumps({"superlink": {"default": "fedloom", "fedloom": here}})


def readme(federation: Any, name: str) -> str:
    """The steps, with this federation's names and ports."""
    nodes = "\n".join(f"| {node} | {_ranges(clients)} |" for node, clients in federation.nodes.items())
    first = next(iter(federation.nodes))
    name = shlex.quote(name)
    return f"""\
# A federation on devices

Nodes reach the server at `{federation.address}` (TLS; each node proves itself with its key).

| node | clients |
|---|---|
{nodes}

1. Install fedloom with `pip install "fedloom[flower]"` on the server and on every device.
2. Move `authority/` to a safe place that is offline. It is needed only to make a new server certificate.
3. On the server: open port {federation.port} (TCP) in the firewall, and no other. Start Flower's SuperLink behind the proxy:

   ```bash
   fedloom deploy server {name}          # or the unit server/fedloom-server.service
   ```

4. Copy each node's folder to its device over a safe channel (it holds the node's private key), and remove it here:

   ```bash
   scp -r {name}/{first} device:/etc/fedloom/{first}
   ```

   On the device, name the folder with its rows in `node.toml` (`data = "/srv/rows"`), then

   ```bash
   fedloom deploy node /etc/fedloom/{first}      # or the unit fedloom-node.service
   ```

   Both units run as root, unless you set `User=` in them and give that user the folder.

5. Run the experiment of `config.toml` (any key can be set on the command line):

   ```bash
   fedloom deploy run {name} rounds=20
   fedloom deploy run {name} --resume runs/FOLDER     # go on after an interruption
   ```

The commands that these start, if you would rather start them yourself (`FLWR_HOME={name}/server/flwr`):

```bash
flower-superlink --host 127.0.0.1 --port {federation.superlink_port} --enable-supernode-auth --isolation process \\
  --superexec-auth-secret-file {name}/server/runtime.secret --database {name}/server/superlink.db \\
  --ssl-ca-certfile {name}/server/ca.crt --ssl-certfile {name}/server/server.crt --ssl-keyfile {name}/server/server.key
flwr supernode register {name}/server/keys/{first}.pub fedloom
flower-supernode --superlink {shlex.quote(federation.address)} --root-certificates {first}/ca.crt --isolation process \\
  --auth-supernode-private-key {first}/node.key --superexec-auth-secret-file {first}/runtime.secret --port 9094
```

What the server can and cannot see, what happens when a part fails, and how to upgrade: docs/deployment.md of fedloom.
"""


def _ranges(clients: list[int]) -> str:
    return f"{clients[0]} to {clients[-1]}" if len(clients) > 2 else ", ".join(map(str, clients))
