"""Texts for the files in a federation's folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import tomli_w

FEDERATION = """\
# host, port: address of the proxy, to which nodes connect. Open only this port in the firewall.
# superlink_port: port of Flower's SuperLink, which listens only on 127.0.0.1.
# listen: address and port on which the proxy listens, if another program (nginx) listens at host and port and forwards to it.
# deadline_s: how long a round waits for its nodes, in seconds. join_s: how long a run waits at its start for missing nodes.
# late_s: with devices.stragglers=late, how long after deadline_s an answer may arrive and still count in a later round.
# nodes: the clients of each node. Every client from 0 to K - 1 must be on exactly one node.

"""

NODE = """\
# server: address of the federation. runtime_port: port for this node's own processes, only on 127.0.0.1.
# clients: numbers of this node's clients, as in the server's federation.toml.
# data: file or folder with this device's data: a table (.csv, .tsv, .parquet; train.csv and test.csv), texts, arrays, or pictures in
#       folders named by class; with several clients, a file or folder client-<number> for each. Or "config": the examples that the run's
#       config gives these clients (for tests).
# folders: with data = "config", the folders and files that a run's config may name (data.path, partition.path). Others are refused.
# budget: the most that this node spends; a request above a limit is refused. Change the limits as you like.
#   message_mib: size of a request or an answer. parameters: of a client's nets. steps: of a client in one round.
#   seconds: for one request. rounds: of one run. memory_mib: resident memory of the worker (no limit if it is absent; Linux).

"""

APP_PROJECT = """\
# Flower needs a bundle to start a run. This bundle is never executed: nodes and server run their installed fedloom.
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
"""Placeholders for Flower's bundle. They are never executed; see fedloom's docs/deployment.md."""

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()
'''

_NGINX = """\
# nginx in front of the proxy of a federation: fewer connections per address reach it, and none that are not TLS.
# TLS is passed on, because nodes check the certificate of the proxy. nginx needs no key.
#
# On Debian: apt install nginx-light libnginx-mod-stream
# Add this line at the end of /etc/nginx/nginx.conf, outside of http {{ }}, then run: nginx -t && systemctl reload nginx
#   include "{file}";
stream {{
    # One address may hold all nodes, each with up to 4 connections.
    limit_conn_zone $binary_remote_addr zone=fedloom:1m;
    limit_conn_log_level warn;

    upstream fedloom {{
        server {listen} max_conns=800;
    }}

    server {{
        listen {port};
        listen [::]:{port};    # remove this line if the machine has no IPv6
        limit_conn fedloom {connections};
        ssl_preread on;        # a connection without a TLS greeting is closed after preread_timeout
        preread_timeout 10s;
        proxy_connect_timeout 5s;
        proxy_timeout 120s;    # without any data
        proxy_pass fedloom;
    }}
}}
"""

_UNIT = """\
# cp {file} /etc/systemd/system/ && systemctl daemon-reload && systemctl enable --now {name}
[Unit]
Description={what}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
# This user must exist and own {folder}: useradd --system fedloom && chown -R fedloom: FOLDER
User={user}
ExecStart={command}
Restart=always
RestartSec=5
# systemd 254 and newer increase the pause from 5 s to a minute; older versions log a warning and always wait 5 s.
RestartSteps=6
RestartMaxDelaySec=60
KillMode=control-group
KillSignal=SIGTERM
TimeoutStopSec=20
# Limits of memory and processes; raise them if the programs are stopped.
# MemoryMax=8G
TasksMax=512
LimitNOFILE=4096
# Only the owner can read what the programs write. Their runtime folder, /run/{name}, is in memory and survives only restarts.
UMask=0077
RuntimeDirectory={name}
RuntimeDirectoryMode=0700
RuntimeDirectoryPreserve=restart
# The programs may write only to these folders, and have no privileges.
ProtectSystem=strict
ReadWritePaths={folder}
ProtectHome={home}
PrivateTmp=true
PrivateDevices=true
NoNewPrivileges=true
CapabilityBoundingSet=
AmbientCapabilities=
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectKernelLogs=true
ProtectControlGroups=true
ProtectClock=true
ProtectHostname=true
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=true
RestrictSUIDSGID=true
RestrictRealtime=true
LockPersonality=true
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


_README = """\
# A federation on devices

Nodes connect to the server at `{address}` over TLS. Each node authenticates with its key.

{nodes}

1. Install fedloom with `pip install "fedloom[flower]"` on the server and on every device.
2. Move `authority/` to a safe offline place. It is needed only to admit nodes, and to renew keys and certificates (`--authority`).
3. On the server, open only port {port} (TCP) in the firewall. Start Flower's SuperLink behind the proxy:

   ```bash
   fedloom deploy server {name}          # or use the unit server/fedloom-server.service
   ```

{step}
5. Run the experiment in `config.toml`. Any key can be overridden on the command line:

   ```bash
   fedloom deploy run {name} rounds=20
   fedloom deploy run {name} --resume runs/FOLDER     # continue an interrupted run
   ```

These commands start the programs below. To start a program yourself, first set `FLWR_HOME={name}/server/flwr`:

```bash
flower-superlink --host 127.0.0.1 --port {superlink_port} --enable-supernode-auth --isolation process \\
  --superexec-auth-secret-file {name}/server/runtime.secret --database {name}/server/superlink.db \\
  --ssl-ca-certfile {name}/server/ca.crt --ssl-certfile {name}/server/server.crt --ssl-keyfile {name}/server/server.key
flwr supernode register {name}/server/keys/NODE.pub fedloom
flower-supernode --superlink {quoted_address} --root-certificates NODE/ca.crt --isolation process \\
  --auth-supernode-private-key NODE/node.key --superexec-auth-secret-file NODE/runtime.secret --port 9094
```

For what the server can and cannot see, what happens when a part fails, and how to upgrade, see fedloom's docs/deployment.md.
"""

_COPY = """\
4. Copy each node's folder to its device over a secure channel, because it contains the node's private key. Then delete it here:

   ```bash
   scp -r {name}/{first} device:/etc/fedloom/{first}
   ```

   On the device, set the folder with its data in `node.toml` (`data = "/srv/rows"`), then start the node:

   ```bash
   fedloom deploy node /etc/fedloom/{first}      # or use the unit fedloom-node.service
   ```

   The units run as the user in their `User=` line, which must exist and own the folder:
   `useradd --system fedloom && chown -R fedloom: /etc/fedloom/{first}`.

"""
_JOIN = """\
4. Admit each node. Its private key is made on the device and never leaves it:

   ```bash
   fedloom deploy join /etc/fedloom/site-1                             # on the device: makes site-1.csr, shows a fingerprint
   fedloom deploy admit {name} site-1.csr --clients 0 --fingerprint SHA256:...      # here: makes site-1.join
   fedloom deploy join /etc/fedloom/site-1 --finish site-1.join --authority SHA256:...   # on the device
   ```

   Compare both fingerprints by telephone or in person. On the device, set the folder with its data in `node.toml`
   (`data = "/srv/rows"`), then start the node:

   ```bash
   fedloom deploy node /etc/fedloom/site-1      # or use the unit fedloom-node.service
   ```

"""


HOMES = ("/home", "/root", "/run/user")  # closed by ProtectHome=true


def server_unit(folder: Path, python: str, user: str) -> str:
    """Return the server's systemd unit for the user that owns the folder. An unprivileged user replaces root."""
    in_home = any(Path(home) in Path(word).parents for home in HOMES for word in (folder, python))
    home = "read-only" if in_home else "true"
    return _unit("server", "SuperLink and proxy of a federation", folder, python, user=user, home=home)


def node_unit(name: str, folder: Path, python: str = "/opt/fedloom/bin/python", user: str = "root") -> str:
    """Return a node's systemd unit. The node's data may be in a home folder."""
    return _unit("node", f"{name} of a federation", folder, python, user=user, home="read-only")


def _unit(step: str, what: str, folder: Path, python: str, *, user: str, home: str) -> str:
    place = _unit_word(folder)
    return _UNIT.format(
        file=f"fedloom-{step}.service",
        name=f"fedloom-{step}",
        what=f"fedloom: {what}",
        command=f"{_unit_word(python)} -m fedloom.cli deploy {step} {place.replace('$', '$$')}",
        folder=place,
        user="fedloom" if user == "root" else user,
        home=home,
    )


def _unit_word(path: Path | str) -> str:
    """Return a path, quoted for a line of a systemd unit."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'


def nginx_conf(folder: Path, port: int, listen: str, n_clients: int) -> str:
    """Return a config for nginx, which listens on a port and forwards to the proxy."""
    file = folder / "server/fedloom-nginx.conf"
    return _NGINX.format(file=file, port=port, listen=listen, connections=max(16, 4 * n_clients))


def flwr_config(superlink: str, ca: Path) -> str:
    """Return Flower's own config, with the address of the SuperLink."""
    here = {"address": superlink, "root-certificates": str(ca.resolve())}
    return tomli_w.dumps({"superlink": {"default": "fedloom", "fedloom": here}})


def readme(federation: Any, name: str) -> str:
    """Return instructions that contain the names and ports of this federation."""
    rows = [f"| {node} | {_ranges(clients)} |" for node, clients in federation.nodes.items()]
    quoted, first = shlex.quote(name), next(iter(federation.nodes), None)
    return _README.format(
        address=federation.address,
        quoted_address=shlex.quote(federation.address),
        port=federation.port,
        superlink_port=federation.superlink_port,
        nodes="\n".join(["| node | clients |", "|---|---|", *rows]) if rows else "Nodes join by requests; see step 4.",
        step=_COPY.format(name=quoted, first=first) if first else _JOIN.format(name=quoted),
        name=quoted,
    )


def _ranges(clients: list[int]) -> str:
    return f"{clients[0]} to {clients[-1]}" if len(clients) > 2 else ", ".join(map(str, clients))
