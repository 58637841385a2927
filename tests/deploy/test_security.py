"""Requests that are refused: unknown keys, another authority, plaintext, and everything except the node API."""

import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from fedloom.deploy.agent import supernode_command
from fedloom.deploy.certificates import certificate_bytes, new_authority, new_node_key, node_key_bytes
from fedloom.deploy.files import NodeFile, read_file
from fedloom.deploy.services import end_group, flower_environment, free_ports

pytestmark = pytest.mark.deploy


@pytest.fixture
def stranger(running, tmp_path):
    """Copy a node's folder, and change the port."""
    shutil.copytree(running.federation.deployment.path / "node-0", tmp_path / "node")
    return tmp_path / "node"


def connects(folder, *, wait_s=25.0, plaintext=False):
    """Return whether Flower's SuperNode can connect with the files in the folder, and its output."""
    node = read_file(folder / "node.toml", NodeFile, "a node's folder")
    command = supernode_command(folder, node.model_copy(update={"runtime_port": free_ports(1)[0]}))
    if plaintext:
        place = command.index("--root-certificates")
        command[place : place + 2] = ["--insecure"]
        place = command.index("--auth-supernode-private-key")
        del command[place : place + 2]
    log = folder / "out.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=flower_environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + wait_s
        while time.monotonic() < until and process.poll() is None and "SuperNode ID" not in log.read_text():
            time.sleep(0.2)
    finally:
        end_group(process, 3)
    return "SuperNode ID" in log.read_text(), log.read_text()


def test_an_unregistered_key_is_refused(stranger):
    private, _ = node_key_bytes(new_node_key())
    (stranger / "node.key").write_bytes(private)
    inside, printed = connects(stranger, wait_s=90.0)
    assert not inside, printed
    assert "Failed to activate SuperNode" in printed, printed


def test_a_server_of_another_authority_is_refused(stranger):
    (stranger / "ca.crt").write_bytes(certificate_bytes(new_authority()))
    inside, printed = connects(stranger, wait_s=90.0)
    assert not inside, printed
    assert "certificate" in printed.lower(), printed


def test_plaintext_is_refused(stranger):
    inside, printed = connects(stranger, plaintext=True)
    assert not inside, printed


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "//v1/control/list-runs",
        "/v1/fleet",
    ],
)
@pytest.mark.parametrize("verb", ["POST", "GET"])
def test_nothing_but_the_node_api_is_reached_from_outside(running, path, verb):
    deployment = running.federation.deployment
    trust = ssl.create_default_context(cafile=str(deployment.server / "ca.crt"))
    request = urllib.request.Request(
        f"https://127.0.0.1:{deployment.file.port}{path}", b"" if verb == "POST" else None, method=verb
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, context=trust, timeout=20)
    with refused.value as answer:
        assert (answer.code, answer.read()) == (403, b"forbidden")


def test_the_node_api_itself_asks_for_a_key(running):
    deployment = running.federation.deployment
    trust = ssl.create_default_context(cafile=str(deployment.server / "ca.crt"))
    where = f"https://127.0.0.1:{deployment.file.port}/v1/fleet/pull-messages"
    request = urllib.request.Request(where, b"", {"Content-Type": "application/protobuf"}, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, context=trust, timeout=20)
    with refused.value as answer:
        assert answer.code == 401, answer.read()


def test_tasks_need_the_secret(running):
    """Other users of the server's machine have no secret."""
    from flwr.supercore.constant import TaskType

    from fedloom.deploy.runtime import read_place, take_task

    deployment = running.federation.deployment
    place = read_place(deployment.server, deployment.superlink, "flwr-serverapp", tls=True)
    with place._replace(secret=b"0" * 64).client() as client, pytest.raises(Exception, match=r"401|403"):
        take_task(client, TaskType.SERVER_APP)


def test_a_proxy_in_the_environment_is_not_used_on_this_machine(tmp_path):
    """Nothing listens at the address of the proxy."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    words = [
        "deploy",
        "up",
        "--local",
        "1",
        "clients=1",
        "rounds=1",
        "data.rows=100",
        f"out={tmp_path / 'run'}",
        "--quiet",
    ]
    command, env = [sys.executable, "-m", "fedloom.cli", *words], {**os.environ, **nowhere}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/summary.json").is_file()
