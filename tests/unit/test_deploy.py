"""The components of a deployment, tested separately."""

import asyncio
import contextlib
import ipaddress
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
from base64 import b64decode, b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import torch
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as loop
from flwr.supernode.nodestate.nodestate_factory import NodeStateFactory
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from fedloom import tree
from fedloom.config.settings import make_settings, to_toml
from fedloom.data import load
from fedloom.deploy import certificates, doors, node_keys, proxy, server, superlink_store, supernode
from fedloom.deploy.agent import WorkerProcess, answer_within, refusal, run_node
from fedloom.deploy.budget import Patience, check_size, resident_mib
from fedloom.deploy.files import Budget, NodeFile, read_file
from fedloom.deploy.folder import Deployment, create_deployment
from fedloom.deploy.local import LocalFederation
from fedloom.deploy.messages import Assignment, Hello, open_envelope, seal
from fedloom.deploy.node_keys import KeyRing, key_line, read_key
from fedloom.deploy.proxy import allowed, make_app, make_server
from fedloom.deploy.server import is_open, proxy_command, run_server, superlink_command
from fedloom.deploy.services import (
    Service,
    end_group,
    free_ports,
    keep_private,
    leashed,
    no_loopback_proxy,
    require_free,
)
from fedloom.deploy.store import NodeStore
from fedloom.deploy.texts import server_unit
from fedloom.errors import ConfigError, WireError
from fedloom.method import Client

DIGITS = {"preprocess": load("digits", rows=10).preprocess().text(indent=None)}

# certificates


@pytest.fixture(scope="module")
def authority():
    return certificates.new_authority()


def test_the_server_certificate_is_good_for_its_hosts_and_signed_by_the_authority(authority):
    server = certificates.new_server(authority, ["fl.example.org", "192.168.1.10", "::1"])
    server.certificate.verify_directly_issued_by(authority.certificate)
    names = server.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(a) for a in ("192.168.1.10", "::1")]
    assert not server.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert isinstance(server.key.curve, ec.SECP384R1)
    with pytest.raises(InvalidSignature):
        server.certificate.verify_directly_issued_by(certificates.new_authority().certificate)


def test_node_keys_are_p384_in_openssh_format():
    private, public = certificates.node_key_bytes(certificates.new_node_key())
    assert private.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert public.startswith(b"ecdsa-sha2-nistp384 ")
    key = load_ssh_private_key(private, None)
    assert key.public_key().public_numbers() == load_ssh_public_key(public).public_numbers()


# the folder


@pytest.fixture
def folder(tmp_path):
    create_deployment(
        tmp_path / "ward", {"clients": 7, "method": {"name": "fedrir"}}, 3, ["fl.example.org", "10.0.0.1"]
    )
    return tmp_path / "ward"


def test_the_folder_has_everything_and_is_private(folder):
    made = Deployment(folder)
    assert made.file.nodes == {"node-0": [0, 1], "node-1": [2, 3], "node-2": [4, 5, 6]}
    assert made.file.host == "fl.example.org"
    secret = {"authority/ca.key", "server/server.key", "server/runtime.secret"}
    secret |= {f"node-{k}/{name}" for k in range(3) for name in ("node.key", "runtime.secret")}
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert secret <= files
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert {path for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)} == set()
    assert not list(folder.glob("node-*/ca.key"))
    assert not list(folder.glob("server/ca.key"))
    for node in made.file.nodes:
        found = read_file(folder / node / "node.toml", NodeFile, "a node's folder")
        assert (found.name, found.server, found.clients) == (node, "fl.example.org:9092", made.file.nodes[node])
        key = load_ssh_private_key((folder / node / "node.key").read_bytes(), None)
        public = load_ssh_public_key(made.public_key(node).read_bytes())
        assert key.public_key().public_numbers() == public.public_numbers()
    context = ssl.create_default_context(cafile=str(folder / "node-0/ca.crt"))
    assert context.get_ca_certs()[0]["subject"]
    load_pem_private_key((folder / "server/server.key").read_bytes(), None)
    unit = (folder / "node-1/fedloom-node.service").read_text()
    assert "Restart=always" in unit
    assert "RestartMaxDelaySec=60" in unit
    assert 'ExecStart="/opt/fedloom/bin/python" -m fedloom.cli deploy node "/etc/fedloom/node-1"' in unit
    assert "fl.example.org:9092" in (folder / "README.md").read_text()


def test_the_bundle_lists_flower_alone_and_holds_no_code_that_runs(folder):
    project = tomllib.loads((folder / "server/app/pyproject.toml").read_text())
    assert [word.partition(">")[0] for word in project["project"]["dependencies"]] == ["flwr"]
    code = (folder / "server/app/fedloom_app.py").read_text()
    assert "torch" not in code
    assert "fedloom." not in code.replace("of fedloom.", "")


def test_the_superlink_listens_on_the_loopback_alone_and_asks_for_keys(folder):
    command = superlink_command(Deployment(folder), folder / "there.db")
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--enable-supernode-auth" in command
    assert command[command.index("--isolation") + 1] == "process"
    assert "--insecure" not in command


@pytest.mark.parametrize(
    ("host", "listens", "address"),
    [
        ("fl.example.org", "0.0.0.0", "fl.example.org:9092"),
        ("192.0.2.7", "0.0.0.0", "192.0.2.7:9092"),
        ("2001:db8::7", "::", "[2001:db8::7]:9092"),
        ("localhost", "127.0.0.1", "localhost:9092"),
        ("127.0.0.2", "127.0.0.2", "127.0.0.2:9092"),
        ("::1", "::1", "[::1]:9092"),
    ],
)
def test_the_proxy_listens_where_nodes_look_for_it(tmp_path, host, listens, address):
    made = create_deployment(tmp_path / "ward", {"clients": 1}, 1, [host])
    assert proxy_command(made)[4] == listens
    assert read_file(tmp_path / "ward/node-0/node.toml", NodeFile, "a node's folder").server == address
    assert f"at `{address}`" in (tmp_path / "ward/README.md").read_text()


def test_flower_receives_the_current_ports_and_folder(folder, monkeypatch):
    moved = folder.rename(folder.with_name('the "new" ward'))
    file = moved / "federation.toml"
    file.write_text(file.read_text().replace("superlink_port = 9091", "superlink_port = 9191"))
    monkeypatch.setattr(server, "require_free", lambda *_: None)
    monkeypatch.setattr(server, "Service", None)  # the SuperLink is not started
    with pytest.raises(TypeError, match="not callable"):
        run_server(Deployment(moved))
    told = tomllib.loads((moved / "server/flwr/config.toml").read_text())["superlink"]["fedloom"]
    assert told == {"address": "127.0.0.1:9191", "root-certificates": str((moved / "server/ca.crt").resolve())}


def test_paths_with_spaces_are_one_word_of_units_and_commands(tmp_path):
    create_deployment(tmp_path / "100% my $ward", {"clients": 1}, 1)
    unit = (tmp_path / "100% my $ward/server/fedloom-server.service").read_text().splitlines()
    assert f'ExecStart="{sys.executable}" -m fedloom.cli deploy server "{tmp_path}/100%% my $$ward"' in unit
    assert f'ReadWritePaths="{tmp_path}/100%% my $ward"' in unit
    readme = (tmp_path / "100% my $ward/README.md").read_text()
    assert "fedloom deploy run '100% my $ward' rounds=20" in readme
    assert "scp -r '100% my $ward'/node-0 " in readme
    assert "useradd --system fedloom && chown -R fedloom: /etc/fedloom/node-0" in readme


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("name", ["server/fedloom-server.service", "node-0/fedloom-node.service"])
def test_units_are_hardened(folder, name):
    """Systemd's score is 9.0 (unsafe) for a unit without these settings."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@pytest.mark.parametrize(
    ("folder", "python", "home"),
    [("/srv/ward", "/opt/v/bin/python", "true"), ("/home/a/ward", "/opt/p", "read-only"), ("/srv/w", "/root/v/p", "read-only")],
)  # fmt: skip
def test_the_units_of_folders_in_a_home_can_read_it(folder, python, home):
    unit = server_unit(Path(folder), python, "ann")
    assert f"\nProtectHome={home}\n" in unit
    assert "\nUser=ann\n" in unit
    assert "\nUser=fedloom\n" in server_unit(Path(folder), python, "root")


def test_files_of_programs_are_private(tmp_path):
    home = tmp_path / "own"
    home.mkdir()
    before = os.umask(0o022)
    try:
        service = Service(
            "writer", ["sh", "-c", f"mkdir {home}/a && echo x > {home}/a/b"], dict(os.environ), home / "log/out.log"
        )
        service.start()
        service.process.wait(20)
        service.end()
        assert os.umask(0o022) == 0o022  # this process keeps its own
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.rglob("*")}
    assert modes == {"a": 0o700, "b": 0o600, "log": 0o700, "out.log": 0o600}


def test_a_folder_is_closed_to_other_users(tmp_path):
    (tmp_path / "node").mkdir(mode=0o755)
    before = os.umask(0o022)
    try:
        assert keep_private(tmp_path / "node") == ""
        assert os.umask(0o022) == 0o077
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "node").stat().st_mode) == 0o700
    assert "make this user its owner" in keep_private(tmp_path / "nowhere")
    os.umask(before)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"no_proxy": "a.org, localhost"}, "a.org,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "*"}, "*,127.0.0.1,localhost,::1"),
    ],
)
def test_connections_to_this_machine_use_no_proxy(given, expected):
    assert no_loopback_proxy(given) == {"NO_PROXY": expected, "no_proxy": expected}


def test_nothing_is_overwritten(folder):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="exists and is not empty"):
        create_deployment(folder, {"clients": 7}, 3)
    with pytest.raises(FileExistsError):
        certificates.write_new(folder / "README.md", "x")
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("values", "nodes", "hosts", "message"),
    [
        ({"clients": 2}, 3, ["h"], "--nodes 3: must be from 1 to the number of clients"),
        ({"clients": 2}, -1, ["h"], "--nodes -1"),
        ({"clients": 2}, 1, ["no host"], "--address no host"),
        ({"clients": 2}, 1, ["fl.example.org:9092"], "--address fl.example.org:9092: must be .*, without a port"),
        ({"clients": 2}, 1, ["h", "192.0.2.7:9092"], "--address 192.0.2.7:9092"),
        ({"clients": 2}, 1, ["[::1]"], "--address"),
        ({"clients": 2}, 1, ["fe80::1%eth0"], "--address fe80::1%eth0"),
        ({"clients": 2, "checkpoint_every": 0}, 1, ["h"], "checkpoint_every=0"),
        ({"clients": 2, "engine": {"name": "processes"}}, 1, ["h"], "engine=processes"),
        (
            {"clients": 2, "method": {"name": "nobody.py:Mine"}},
            1,
            ["h"],
            "method=nobody.py:Mine: there is no file",
        ),
        (
            {"clients": 2, "model": {"name": "nonet.py:Net"}},
            1,
            ["h"],
            "model=nonet.py:Net: file nonet.py does not exist",
        ),
        (
            {"clients": 2, "models": ["mlp", "nonet.py:Net"]},
            1,
            ["h"],
            "models=nonet.py:Net: file nonet.py does not exist",
        ),
        (
            {"clients": 2, "common_model": {"name": "nonet.py:Net"}},
            1,
            ["h"],
            "common_model=nonet.py:Net: file nonet.py does not exist",
        ),
    ],
)
def test_undeployable_settings_are_refused(tmp_path, values, nodes, hosts, message):
    with pytest.raises(ConfigError, match=message):
        create_deployment(tmp_path / "new", values, nodes, hosts)
    assert not (tmp_path / "new").exists()


def test_files_of_code_have_different_names_on_a_node(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "net.py").write_text(f"# {place}\n")
    one, other = (f"{tmp_path / place / 'net.py'}:Net" for place in ("a", "b"))
    with pytest.raises(ConfigError, match=r"a/net.py and .*b/net.py: file names must differ"):
        create_deployment(tmp_path / "new", {"clients": 2, "models": [one, other]}, 1)
    assert not (tmp_path / "new").exists()
    create_deployment(tmp_path / "new", {"clients": 2, "models": [one, f"{tmp_path}/b/../a/net.py:Other"]}, 1)
    assert (tmp_path / "new/node-0/code/net.py").read_text() == "# a\n"


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "mine.json").touch()
    with pytest.raises(ConfigError, match=r"mine.json/ward: Not a directory; choose another folder"):
        create_deployment(tmp_path / "mine.json/ward", {"clients": 2}, 1)


@pytest.mark.parametrize("name", ["runtime.secret", "ca.crt", "keys/node-1.pub"])
def test_a_server_without_its_keys_is_refused_in_one_line(folder, name):
    (folder / "server" / name).unlink()
    with pytest.raises(ConfigError, match=f"server/{name} is missing or not readable"):
        Deployment(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("deadline_s = 600.0", "dedline_s = 600.0", r"dedline_s: unknown key \(did you mean 'deadline_s'\?\)"),
        ("port = 9092", "port = 70000", "port: input should be less than or equal to 65535"),
        ("port = 9092", "port = ", "cannot be read"),
    ],
)
def test_a_bad_federation_file_ends_in_one_line(folder, old, new, message):
    file = folder / "federation.toml"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as error:
        Deployment(folder)
    assert "\n" not in str(error.value)


# the proxy


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/v1/fleet/register-node"])
def test_the_node_api_may_pass(path):
    assert allowed("POST", path.encode())
    assert not allowed("GET", path.encode())


@pytest.mark.parametrize(
    "path",
    ["/", "/v1/control/start-run", "/v1/fleet", "/v1/fleet/", "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control",
     "/v1/fleet//x", "/v1/fleet/a/b", "//v1/fleet/x", "/V1/FLEET/x", "/v1/fleet/x\n", "/v1/fleet/x;y", "/v1/runtime/acquire-task"],
)  # fmt: skip
def test_nothing_else_may_pass(path):
    assert not allowed("POST", path.encode())


NODE_KEY = certificates.new_node_key()


def signed(key=NODE_KEY, age_s=0.0, text=None):
    """Return the headers of a node's request in the form that Flower creates."""
    timestamp = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
    signature = key.sign((text or timestamp).encode(), ec.ECDSA(hashes.SHA256()))
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    values = {"flwr-public-key": b64encode(pem), "flwr-signature": b64encode(signature)}
    return {name: value.decode() for name, value in values.items()} | {"flwr-timestamp": timestamp}


class Proxied:
    """The proxy in front of a server that records its requests. Its only node signs the requests."""

    def __init__(self, folder, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.reached: list[tuple[str, bytes, str | None]] = []
        inner = Starlette(routes=[Route("/{path:path}", self.tell, methods=["GET", "POST"])])
        client = httpx.AsyncClient(transport=transport or httpx.ASGITransport(inner))
        (folder / "keys").mkdir(parents=True)
        (folder / "keys/node-0.pub").write_bytes(certificates.node_key_bytes(NODE_KEY)[1])
        self.app = make_app("https://127.0.0.1:9091", client, KeyRing(folder / "keys"))

    async def tell(self, request):
        self.reached.append((request.url.path, await request.body(), request.headers.get("x-more")))
        return JSONResponse({"seen": True}, 201, {"x-answer": "1"})

    def ask(self, verb, path, headers=None, **what):
        async def send():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="https://fl") as client:
                return await client.request(verb, path, headers=signed() | (headers or {}), **what)

        return asyncio.run(send())


def test_the_proxy_hands_on_body_headers_and_answer(tmp_path):
    proxied = Proxied(tmp_path)
    answer = proxied.ask("POST", "/v1/fleet/push-object", content=b"\x00\xff", headers={"x-more": "s"})
    assert (answer.status_code, answer.json(), answer.headers["x-answer"]) == (201, {"seen": True}, "1")
    assert proxied.reached == [("/v1/fleet/push-object", b"\x00\xff", "s")]


@pytest.mark.parametrize(
    ("verb", "path"),
    [("POST", "/v1/control/start-run"), ("GET", "/v1/fleet/get-run"), ("POST", "/v1/fleet/x?y=1"), ("DELETE", "/")],
)
def test_the_proxy_lets_nothing_else_reach_the_server(tmp_path, verb, path):
    proxied = Proxied(tmp_path)
    assert proxied.ask(verb, path).status_code == 403
    assert proxied.reached == []


def test_the_proxy_refuses_what_is_too_large(tmp_path):
    proxied = Proxied(tmp_path)
    assert proxied.ask("POST", "/v1/fleet/push-object", content=bytes(65 * 2**20)).status_code == 413
    assert proxied.reached == []


def test_the_proxy_waits_for_a_body_no_longer_than_it_must(tmp_path, monkeypatch):
    monkeypatch.setattr(proxy, "TIMEOUT_S", 0.05)

    async def slowly():
        yield b"x"
        await asyncio.sleep(60)

    proxied = Proxied(tmp_path)
    assert proxied.ask("POST", "/v1/fleet/push-object", content=slowly()).status_code == 408
    assert proxied.reached == []


@pytest.mark.parametrize("limit", ["MAX_HELD", "MAX_HELD_BY_NODE"])
def test_the_proxy_holds_no_more_bodies_than_it_may(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(proxy, limit, 10)
    proxied = Proxied(tmp_path)
    assert proxied.ask("POST", "/v1/fleet/push-object", content=bytes(11)).status_code == 503
    assert (
        proxied.ask("POST", "/v1/fleet/push-object", content=bytes(10)).status_code == 201
    )  # the first one is released
    assert proxied.ask("POST", "/v1/fleet/push-object", content=bytes(10)).status_code == 201


def test_the_proxy_says_when_the_superlink_is_gone(tmp_path):
    def refuse(request):
        raise httpx.ConnectError("refused")

    assert Proxied(tmp_path, httpx.MockTransport(refuse)).ask("POST", "/v1/fleet/pull-messages").status_code == 503


def test_a_large_body_has_more_time(tmp_path, monkeypatch):
    monkeypatch.setattr(proxy, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(proxy, "BODY_RATE", 1000)

    async def slowly(size):
        for _ in range(10):
            await asyncio.sleep(0.05)
            yield bytes(size)

    proxied = Proxied(tmp_path)
    assert proxied.ask("POST", "/v1/fleet/push-object", content=slowly(100)).status_code == 201
    assert proxied.ask("POST", "/v1/fleet/push-object", content=slowly(1)).status_code == 408


UNKNOWN, CLOCK, INVALID = "its key is not among", "its clock differs", "its signature is not valid"
STRANGERS = {
    "another key": (lambda: signed(certificates.new_node_key()), UNKNOWN),
    "an old signature": (lambda: signed(age_s=306), CLOCK),
    "a signature of the future": (lambda: signed(age_s=-6), CLOCK),
    "a signature of other words": (lambda: signed(text="2020-01-01T00:00:00+00:00"), INVALID),
    "no time zone": (lambda: signed() | {"flwr-timestamp": "2026-01-01T00:00:00"}, INVALID),
    "no base64": (lambda: signed() | {"flwr-signature": "é"}, INVALID),
    "no signature": (lambda: {"flwr-signature": ""}, INVALID),
}


@pytest.mark.parametrize("who", STRANGERS)
def test_the_proxy_reads_nothing_from_strangers(tmp_path, who):
    async def body():
        raise AssertionError("the body was read")
        yield b""

    proxied = Proxied(tmp_path)
    headers = [(name, value.encode()) for name, value in (signed() | STRANGERS[who][0]()).items()]

    async def send():
        transport = httpx.ASGITransport(proxied.app)
        async with httpx.AsyncClient(transport=transport, base_url="https://fl") as client:
            return await client.post("/v1/fleet/push-object", headers=headers, content=body())

    answer = asyncio.run(send())
    assert (answer.status_code, answer.headers["connection"]) == (412, "close")
    assert STRANGERS[who][1] in answer.json()["detail"]
    assert proxied.reached == []


def test_a_key_may_be_added_and_removed_while_the_proxy_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(node_keys, "REREAD_S", 0.0)
    proxied = Proxied(tmp_path)
    (tmp_path / "keys/node-0.pub").rename(tmp_path / "node-0.pub")
    assert proxied.ask("POST", "/v1/fleet/push-object").status_code == 412
    (tmp_path / "node-0.pub").rename(tmp_path / "keys/node-0.pub")
    assert proxied.ask("POST", "/v1/fleet/push-object").status_code == 201


def twin(headers):
    """Return the headers with the second valid signature of an ECDSA signature, which anyone can compute."""
    order = int("ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16)
    r, s = decode_dss_signature(b64decode(headers["flwr-signature"]))
    return headers | {"flwr-signature": b64encode(encode_dss_signature(r, order - s)).decode()}


def test_a_signed_request_is_accepted_once(tmp_path):
    proxied, headers = Proxied(tmp_path), signed()
    assert proxied.ask("POST", "/v1/fleet/push-object", headers).status_code == 201
    for again in (headers, twin(headers)):
        answer = proxied.ask("POST", "/v1/fleet/pull-object", again)
        assert (answer.status_code, answer.text) == (401, "the request was sent before")
    assert proxied.ask("POST", "/v1/fleet/push-object", twin(signed())).status_code == 201
    assert len(proxied.reached) == 2


def test_requests_are_remembered_as_long_as_they_are_valid_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(node_keys, "MAX_REMEMBERED", 2)
    proxied = Proxied(tmp_path)
    codes = [proxied.ask("POST", "/v1/fleet/push-object").status_code for _ in range(3)]
    assert codes == [201, 201, 503]
    monkeypatch.setattr(node_keys, "REMEMBERED_S", 0.0)
    assert proxied.ask("POST", "/v1/fleet/push-object").status_code == 201


def test_a_key_is_accepted_until_it_expires(tmp_path):
    proxied = Proxied(tmp_path)
    file, public = tmp_path / "keys/node-0.pub", certificates.node_key_bytes(NODE_KEY)[1]
    file.write_bytes(key_line(public, datetime.now(UTC) + timedelta(seconds=60)))
    assert read_key(file).node == "node-0"
    assert proxied.ask("POST", "/v1/fleet/push-object").status_code == 201
    file.write_bytes(key_line(public, datetime.now(UTC) - timedelta(seconds=1)))
    answer = Proxied(tmp_path / "other").ask("POST", "/v1/fleet/push-object")
    assert answer.status_code == 201
    ring = KeyRing(tmp_path / "keys")
    assert "its key expired on" in ring.signer(signed()).reason


@pytest.mark.parametrize("content", [b"", b"ssh-ed25519 AAAA", b"junk\n", b"{until}"])
def test_a_broken_key_file_shuts_out_no_other_node(tmp_path, capsys, content):
    proxied = Proxied(tmp_path)
    public = certificates.node_key_bytes(NODE_KEY)[1].strip()
    (tmp_path / "keys/broken.pub").write_bytes(content.replace(b"{until}", public + b" until=tomorrow"))
    with pytest.raises(ConfigError, match=r"broken.pub is not"):
        read_key(tmp_path / "keys/broken.pub")
    assert proxied.ask("POST", "/v1/fleet/push-object").status_code == 201
    assert "ignored: " in capsys.readouterr().err


def test_a_body_must_keep_a_lowest_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(proxy, "STEP_S", 0.2)
    monkeypatch.setattr(proxy, "GRACE_S", 0.2)
    monkeypatch.setattr(proxy, "LOWEST_RATE", 1000)  # 200 bytes in each 0.2 s

    async def body(sizes):
        for size in sizes:
            yield bytes(size)
            await asyncio.sleep(0.1)

    proxied = Proxied(tmp_path)
    for sizes, status in (([900] * 8, 201), ([300, *[20] * 8], 408), ([1] * 8, 408), ([20] * 2, 201)):
        assert proxied.ask("POST", "/v1/fleet/push-object", content=body(sizes)).status_code == status, sizes


def test_the_superlink_may_take_longer_than_a_body(tmp_path, monkeypatch):
    monkeypatch.setattr(proxy, "TIMEOUT_S", 0.1)

    async def slow(request):
        await asyncio.sleep(0.3)
        return httpx.Response(200)

    assert Proxied(tmp_path, httpx.MockTransport(slow)).ask("POST", "/v1/fleet/pull-messages").status_code == 200


@contextlib.contextmanager
def serving(folder, host="127.0.0.1"):
    """Run the proxy itself in a thread. Return its port."""
    served = make_server(host, 0, 1, folder)
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        assert wait_for(lambda: served.started)
        yield served.servers[0].sockets[0].getsockname()[1]
    finally:
        served.should_exit = True
        thread.join(20)


def connect(folder, port, *, tls=True):
    raw = socket.create_connection(("127.0.0.1", port), 20)
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    return context.wrap_socket(raw, server_hostname="127.0.0.1") if tls else raw


def is_cut_off(connection, within_s=20.0):
    """Return whether the other end closes the connection in time."""
    connection.settimeout(within_s)
    try:
        while connection.recv(1024):
            pass
    except TimeoutError:
        return False
    except OSError:  # closed without a TLS close message
        pass
    return True


REFUSED = b"POST /no HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\n"


@pytest.mark.parametrize(
    ("tls", "words"),
    [(False, b""), (True, b""), (True, b"POST /v1/fleet/x HTTP/1.1\r\nhost: h"), (True, REFUSED)],
    ids=["no handshake", "nothing", "half a header", "an answer and a part of a body"],
)
def test_the_proxy_cuts_off_connections_without_a_complete_header(folder, monkeypatch, tls, words):
    monkeypatch.setattr(doors, "HEADER_S", 0.5)
    with serving(folder / "server") as port, connect(folder / "server", port, tls=tls) as silent:
        silent.sendall(words)
        if words == REFUSED:  # part of its body comes after the answer
            assert silent.recv(1024).startswith(b"HTTP/1.1 403 ")
            silent.sendall(b"x")
        assert is_cut_off(silent)


def test_the_proxy_refuses_a_header_without_an_end(folder):
    with serving(folder / "server") as port, connect(folder / "server", port) as endless:
        endless.sendall(b"POST /v1/fleet/x HTTP/1.1\r\nhost: " + bytes(100_000).replace(b"\0", b"h"))
        endless.settimeout(5)
        assert endless.recv(1024).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("limit", ["MAX_HANDSHAKES", "HANDSHAKES_PER_ADDRESS"])
def test_unfinished_handshakes_shut_nobody_out(folder, monkeypatch, limit):
    monkeypatch.setattr(doors, limit, 3)
    with serving(folder / "server") as port, contextlib.ExitStack() as stack:
        raw = [stack.enter_context(connect(folder / "server", port, tls=False)) for _ in range(9)]
        assert is_cut_off(raw[0], 4)
        assert is_answered(stack.enter_context(connect(folder / "server", port)), request_of(folder, 0))
        assert not is_cut_off(raw[-1], 0.3)


def test_what_arrives_with_the_end_of_a_handshake_is_answered(folder):
    context = ssl.create_default_context(cafile=str(folder / "server/ca.crt"))
    with serving(folder / "server") as port, socket.create_connection(("127.0.0.1", port), 20) as raw:
        arrived, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        end = context.wrap_bio(arrived, sent, server_hostname="127.0.0.1")
        while True:
            try:
                end.do_handshake()
                break
            except ssl.SSLWantReadError:
                raw.sendall(sent.read())
                arrived.write(raw.recv(65536))
        end.write(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        raw.sendall(sent.read())  # the client's last message and its request, at once
        arrived.write(raw.recv(65536))
        received = b""
        while b"403" not in received:
            try:
                received += end.read(1024)
            except ssl.SSLWantReadError:
                arrived.write(raw.recv(65536))
        assert received.startswith(b"HTTP/1.1 403 ")


def test_the_proxy_keeps_connections_that_are_being_answered(folder, monkeypatch):
    monkeypatch.setattr(doors, "HEADER_S", 0.5)
    whole = request_of(folder, 1)
    with serving(folder / "server") as port, connect(folder / "server", port) as node:
        for part in (whole[:9], whole[9:]):
            node.sendall(part)
            time.sleep(0.3)
        assert not is_cut_off(node, 1)
        node.sendall(b"x")
        assert node.recv(1024).startswith(b"HTTP/1.1 503 ")  # there is no SuperLink


def request_of(folder, length):
    """Return the header of a request that is signed by node 0."""
    key = load_ssh_private_key((folder / "node-0/node.key").read_bytes(), None)
    lines = [f"{name}: {value}" for name, value in signed(key).items()]
    return "\r\n".join(["POST /v1/fleet/x HTTP/1.1", "host: h", f"content-length: {length}", *lines, "", ""]).encode()


def is_answered(connection, header):
    """Return whether a request without a body is forwarded. There is no SuperLink to answer the request."""
    connection.sendall(header)
    received = b""
    while b"does not answer" not in received:
        if not (more := connection.recv(1024)):
            return False
        received += more
    return received.startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("limit", ["MAX_CONNECTIONS", "PER_ADDRESS"])
def test_the_proxy_cuts_off_connections_beyond_its_limit(folder, monkeypatch, limit):
    monkeypatch.setattr(doors, limit, 2)
    monkeypatch.setattr(doors, "PER_NODE", 0 if limit == "PER_ADDRESS" else 4)
    with serving(folder / "server") as port, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(connect(folder / "server", port)) for _ in range(2))
        for each in (first, second):
            assert is_answered(each, request_of(folder, 0))
        third = stack.enter_context(connect(folder / "server", port))
        assert is_cut_off(third, 4)
        first.close()
        with connect(folder / "server", port) as fourth:
            assert is_answered(fourth, request_of(folder, 0))


def test_strangers_cannot_take_all_connections(folder, monkeypatch):
    monkeypatch.setattr(doors, "MAX_UNKNOWN", 2)
    with serving(folder / "server") as port, contextlib.ExitStack() as stack:
        known = [stack.enter_context(connect(folder / "server", port)) for _ in range(2)]
        for each in known:
            assert is_answered(each, request_of(folder, 0))
        strangers = [stack.enter_context(connect(folder / "server", port)) for _ in range(2)]
        another = stack.enter_context(connect(folder / "server", port))  # the oldest stranger gives way to it
        assert is_cut_off(strangers[0], 4)
        assert not is_cut_off(strangers[1], 0.5)
        for node in (another, *known):
            assert is_answered(node, request_of(folder, 0))


@pytest.mark.parametrize("limit", ["MAX_UNKNOWN", "PER_ADDRESS"])
def test_a_node_is_answered_while_strangers_hold_connections(folder, monkeypatch, limit):
    monkeypatch.setattr(doors, limit, 3)
    monkeypatch.setattr(doors, "PER_NODE", 0 if limit == "PER_ADDRESS" else 8)
    refused = b"POST /v1/fleet/x HTTP/1.1\r\nhost: h\r\ncontent-length: 100\r\n\r\nx"
    with serving(folder / "server") as port, contextlib.ExitStack() as stack:
        for words in (b"", refused) * 4:
            stack.enter_context(connect(folder / "server", port)).sendall(words)
        for _ in range(2):
            assert is_answered(stack.enter_context(connect(folder / "server", port)), request_of(folder, 0))


def test_the_connection_of_a_stranger_is_closed_without_reading_its_body(folder):
    with serving(folder / "server") as port, connect(folder / "server", port) as stranger:
        stranger.sendall(b"POST /v1/fleet/x HTTP/1.1\r\nhost: h\r\ncontent-length: 100000000\r\n\r\nx")
        assert stranger.recv(1024).startswith(b"HTTP/1.1 401 ")
        assert is_cut_off(stranger, 4)


MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


@contextlib.contextmanager
def nginx(folder, conf, *words):
    """Run nginx with fedloom's config, or only check the config."""
    load = f"load_module {MODULE};" if MODULE.is_file() else ""
    (folder / "main.conf").write_text(
        f"{load} daemon off; master_process off; pid {folder}/pid; error_log stderr warn; events {{}}\n{conf}"
    )
    command = ["nginx", "-e", "stderr", "-c", str(folder / "main.conf"), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")
def test_nginx_hands_on_connections_and_limits_them(tmp_path):
    outer = free_ports(1)[0]
    made = create_deployment(tmp_path / "my ward", {"clients": 2}, 0, ports={"proxy": outer}, nginx=True)
    assert (made.file.listen, made.door) == (f"127.0.0.1:{outer + 1}", ("127.0.0.1", "127.0.0.1", outer + 1))
    assert proxy_command(made)[4:6] == ["127.0.0.1", str(outer + 1)]
    with nginx(tmp_path, f'include "{made.server}/fedloom-nginx.conf";', "-t") as check:
        assert b"test is successful" in check.communicate(timeout=20)[1]
    with serving(made.server) as port, contextlib.ExitStack() as stack:
        conf = (made.server / "fedloom-nginx.conf").read_text().replace(made.file.listen, f"127.0.0.1:{port}")
        stack.enter_context(nginx(tmp_path, re.sub(r"listen \[::\].*", "", conf)))
        assert wait_for(lambda: is_listening(outer), 20)
        inside = [stack.enter_context(connect(made.server, outer)) for _ in range(16)]
        inside[-1].sendall(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        assert inside[-1].recv(1024).startswith(b"HTTP/1.1 403 ")
        with pytest.raises(OSError, match=r".*"):
            connect(made.server, outer).recv(1)


def is_listening(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def test_a_server_is_open_where_its_proxy_listens(folder):
    made = Deployment(folder)
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving(made.server) as inner, serving(made.server, "::1") as outer:
        made.file = made.file.model_copy(update={"host": "::1", "port": outer, "superlink_port": inner})
        assert is_open(made)
    assert not is_open(made)


# a node's store


def blank(i):
    return Client({"params": {"w": torch.zeros(2)}, "buffers": {}}, {"n": torch.tensor(0)}, {})


def state(value):
    return blank(0)._replace(memory={"n": torch.tensor(value)})


def asked(base, keep=0):
    return [Assignment(client=0, slot=0, base=base, keep=keep)]


def test_states_are_found_by_round_and_undone_by_asking_for_an_earlier_one(tmp_path):
    store = NodeStore(blank, tmp_path)
    for number in range(3):
        store.turn_to(number, asked(base=number))
        assert int(store.get(0).memory["n"]) == number
        store.put(0, state(number + 1))
    assert store.labels(0) == [1, 2, 3]
    again = NodeStore(blank, tmp_path)  # after a restart
    again.turn_to(3, asked(base=2, keep=2))
    assert int(again.get(0).memory["n"]) == 2
    again.put(0, state(9))
    assert again.labels(0) == [2, 3, 4]
    again.turn_to(1, asked(base=1))
    again.put(0, state(5))
    assert again.labels(0) == [2]  # later states belong to a run that is undone
    assert tree.equal(again.get(0)._asdict(), blank(0)._asdict())  # label 1 is undone
    assert list(again.changed()) == [0]
    assert "client 0 starts from its initial state" in again.notes[0]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("content", [b"", b"x" * 40, None])
def test_a_broken_state_is_refused(tmp_path, content):
    store = NodeStore(blank, tmp_path)
    store.turn_to(0, asked(base=0))
    store.put(0, state(1))
    file = tmp_path / "client-0/1.safetensors"
    file.write_bytes(file.read_bytes()[:-3] if content is None else content)
    store.turn_to(1, asked(base=1))
    with pytest.raises(WireError):
        store.get(0)


# services


def running(group=None, number=None):
    """Return whether a process, or a process of a group, is running and not a zombie."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, _, of = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if state != "Z" and (int(of) == group or int(entry.name) == number):
                return True
    return False


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def test_a_service_is_started_again_after_a_growing_pause_and_ended_as_a_whole(tmp_path):
    up = str(tmp_path / "up")
    script = f"import subprocess, time; subprocess.Popen(['sleep', '60']); open({up!r}, 'a').write('x'); time.sleep(60)"
    service = Service("sleeper", [sys.executable, "-c", script], os.environ, tmp_path / "log")
    service.start()
    try:
        assert wait_for((tmp_path / "up").is_file)
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait()
        assert "restarting in 1 s" in service.tend()
        assert service.tend() is None
        assert service.process is None
        time.sleep(1.05)
        service.tend()
        assert wait_for(lambda: (tmp_path / "up").read_text() == "xx")
        group = service.process.pid
    finally:
        service.end()
    assert wait_for(lambda: not running(group=group))


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_leashed_process_ends_with_its_parent(tmp_path):
    command = leashed(["sleep", "60"])
    code = f"import subprocess, sys; p = subprocess.Popen({command!r}); print(p.pid, flush=True); sys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    assert running(number=child)
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    assert wait_for(lambda: not running(number=child))


def test_programs_do_not_import_from_the_current_folder(folder, monkeypatch):
    (folder / "random.py").write_text("raise SystemExit('not the one of Python')")
    monkeypatch.chdir(folder)
    federation = LocalFederation(Deployment(folder))
    federation.start_node("nobody")
    assert federation.processes["nobody"].wait(60) == 2
    assert "nobody" in federation.log("nobody").splitlines()[-1]
    assert "not the one of Python" not in federation.log("nobody")


def test_a_group_that_will_not_end_is_killed():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    end_group(process, 0.2)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_free_ports_differ():
    assert len(set(free_ports(20))) == 20


def test_flower_is_on_the_machine():
    assert shutil.which("flower-superlink", path=str(Path(sys.executable).parent))


# the worker of a node


@pytest.fixture
def worker(tmp_path):
    """Start a node's worker process. Return it and its number. The method `hang` never returns, and `die` exits the process."""
    values = {"clients": 1, "data": {"name": "digits", "rows": 60}, "model": {"name": "mlp", "hidden": 4}}
    place = create_deployment(tmp_path / "federation", values, 1, demo=True)
    started = WorkerProcess(place.path / "node-0", threading.Event(), Budget())
    started.tend()
    yield started
    started.end()


@pytest.fixture
def process(worker):
    """Return the worker's latest process."""
    return lambda: max(multiprocessing.active_children(), key=lambda child: int(child.name.rpartition("-")[2]))


def hello(**settings):
    config = to_toml(make_settings({"clients": 1, "data": {"name": "digits", "rows": 60}, "model": {"name": "mlp"}}))
    call = {"config": config, **DIGITS, "deadline_s": 30.0}
    return seal(Hello(call=call | {"run": "0" * 16} | settings), {})


def test_a_worker_that_is_killed_while_idle_is_replaced(worker, process):
    assert open_envelope(worker.answer(hello(), Patience(60))).header.clients == [0]
    killed = process()
    killed.kill()
    killed.join(5)
    worker.tend()
    assert open_envelope(worker.answer(hello(), Patience(60))).header.clients == [0]


def test_a_worker_that_hangs_or_dies_is_ended_and_says_so(worker, process):
    before = process().pid
    os.kill(before, signal.SIGSTOP)
    assert "did not answer within 0.5 s" in open_envelope(worker.answer(hello(), Patience(0.5))).header.reason
    worker.tend()
    assert process().pid != before
    os.kill(process().pid, signal.SIGKILL)
    assert (
        "ended during the request (exit code -9)" in open_envelope(worker.answer(hello(), Patience(60))).header.reason
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers start from nothing")
def test_agent_and_worker_share_most_of_their_memory(worker, process):
    """A device with 1 GB has no room for torch twice."""
    open_envelope(worker.answer(hello(), Patience(60)))
    lines = Path(f"/proc/{process().pid}/smaps_rollup").read_text().splitlines()
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:] if line.endswith("kB")}
    assert kb["Private_Dirty"] + kb["Private_Clean"] < 0.5 * kb["Rss"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_uses_more_memory_than_its_owner_allows_is_replaced(worker, process, monkeypatch):
    assert resident_mib(os.getpid()) > 50
    assert resident_mib(2**22 + 1) == 0
    monkeypatch.setattr(worker, "_budget", Budget(memory_mib=20))
    before = process().pid
    reason = open_envelope(worker.answer(hello(), Patience(60))).header.reason
    assert re.match(r"the worker used \d+ MiB of memory and was replaced \(budget.memory_mib=20; the owner of", reason)
    worker.tend()
    assert process().pid != before


@pytest.mark.parametrize(
    ("seconds", "deadline_s", "message"),
    [
        (0.3, 60.0, "within 0.3 s and was replaced (budget.seconds=0.3; the owner of this node sets it in node.toml)"),
        (60.0, 0.3, "within 0.3 s and was replaced"),
    ],
)
def test_the_time_of_a_request_is_limited_by_the_nodes_owner(worker, process, seconds, deadline_s, message):
    os.kill(process().pid, signal.SIGSTOP)
    node = NodeFile(name="n", server="s", runtime_port=1, clients=[0], budget=Budget(seconds=seconds))
    reason = open_envelope(answer_within(worker, hello(deadline_s=deadline_s), node)).header.reason
    assert reason == f"the worker did not answer {message}"


def test_the_size_of_messages_is_limited_by_the_nodes_owner(worker):
    node = NodeFile(name="n", server="s", runtime_port=1, clients=[0], budget=Budget(message_mib=1e-3))
    with pytest.raises(ConfigError, match=r"^budget.message_mib=0.001: the request has .* MiB; the owner of this node"):
        answer_within(worker, hello(), node)
    with pytest.raises(ConfigError, match=r"the answer has 3.0 MiB"):
        check_size(Budget(message_mib=2.0), 3 * 2**20, "answer")


def test_a_node_says_why_the_server_refuses_it(tmp_path):
    log = tmp_path / "supernode.log"
    log.write_text("INFO: fine\n")
    assert refusal(log) == ""
    log.write_text("x" * 9000 + "\nERROR\n[code: 2004] Failed to activate SuperNode: its key is not known\nINFO: end\n")
    assert refusal(log) == "; Failed to activate SuperNode: its key is not known"
    log.write_text(log.read_text() + "INFO: connected again\n" * 200)
    assert refusal(log) == ""


def test_a_node_without_its_data_folder_does_not_start(folder):
    with pytest.raises(ConfigError, match=r"^data=data: .*node-0/data does not exist; set data in .*node.toml$"):
        run_node(folder / "node-0")


def test_a_port_in_use_is_a_one_line_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^port {port} is in use; is it you"):
            require_free(port, "is it you?")
    require_free(port, "")


# Flower's SuperNode


@pytest.mark.parametrize("when", ["pull_object", "confirm_message_received"])
def test_a_message_whose_run_ends_while_it_is_fetched_leaves_no_task_behind(when):
    """Such a task has no message, and would block the node until the task expires."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 3
    message = Message(RecordDict({"a": ConfigRecord({"b": b"c"})}), 7, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = get_all_nested_objects(message)

    def over(*_):
        raise RunNotRunningException

    stores = ObjectStoreFactory()
    state = NodeStateFactory(stores).state()
    state.set_node_id(7)
    state.store_run(Run.create_empty(1))
    calls = {"pull_object": lambda _, name: objects[name].deflate(), "confirm_message_received": lambda *_: None}
    taken = supernode.cleaning(loop._pull_and_store_message)(
        state=state,
        object_store=stores.store(),
        node_config={},
        receive=lambda: (message, get_object_tree(message)),
        get_run=None,
        get_fab=None,
        trusted_entities=None,
        **(calls | {when: over}),
    )
    (task,) = state.get_tasks()
    assert (taken, task.status.status, task.status.sub_status) == (None, "finished", "failed")
    assert "the run of this message is over" in task.status.details
    assert not state.get_messages_legacy()


# the SuperLink's messages


def test_messages_are_in_memory_if_the_system_has_a_runtime_folder(folder, tmp_path):
    own = folder / "server"
    (tmp_path / "run").mkdir()
    (tmp_path / "session").mkdir()
    session = {"XDG_RUNTIME_DIR": str(tmp_path / "session")}
    service = {"RUNTIME_DIRECTORY": f"{tmp_path / 'run'}:/elsewhere", **session}
    found = superlink_store.database(own, environment=service)
    assert found.parent.parent == tmp_path / "run"
    assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
    assert superlink_store.database(own, environment=service) == found
    assert superlink_store.database(own, environment=session).parent.parent == tmp_path / "session"
    assert superlink_store.database(folder, environment=service) != found  # another federation
    for environment, keep in ((service, True), ({}, False), ({"XDG_RUNTIME_DIR": "/nowhere"}, False)):
        assert superlink_store.database(own, keep=keep, environment=environment) == (own / "superlink.db").resolve()


def test_deleted_messages_leave_the_log_and_the_database_is_deleted(tmp_path):
    file, mark = tmp_path / "superlink.db", b"fedloom1"
    flower = sqlite3.connect(file)  # stays open, with Flower's settings
    flower.execute("PRAGMA journal_mode=WAL")
    flower.execute("PRAGMA synchronous=NORMAL")
    flower.execute("PRAGMA secure_delete=ON")
    flower.execute("CREATE TABLE messages (content BLOB)")
    flower.executemany("INSERT INTO messages VALUES (?)", [(mark * 100,)] * 50)
    flower.commit()
    flower.execute("DELETE FROM messages")
    flower.commit()
    log = tmp_path / "superlink.db-wal"
    assert mark in log.read_bytes()
    superlink_store.truncate(file)
    assert log.stat().st_size == 0
    assert mark not in file.read_bytes()
    flower.execute("BEGIN IMMEDIATE")
    superlink_store.truncate(file)  # busy
    flower.close()
    superlink_store.truncate(tmp_path / "none.db")
    superlink_store.delete(file)
    assert list(tmp_path.iterdir()) == []
