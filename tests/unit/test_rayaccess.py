"""Errors for a Ray cluster that cannot be joined, before `ray.init`."""

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedloom.engines.ray.address import check_address, quiet_environment
from fedloom.errors import ConfigError

grpc = pytest.importorskip("grpc", reason="comes with Ray")


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """Run a service that answers callers whose token is `right`. Return its port. No token is set."""
    for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    class Door(grpc.GenericRpcHandler):
        def service(self, details):
            def answer(request, context):
                if ("authorization", "Bearer right") not in context.invocation_metadata():
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Door()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


@pytest.mark.parametrize("kind", ["", "ray://"])
def test_a_token_is_tried_before_ray_tries_it(cluster, kind, monkeypatch, tmp_path):
    address = f"{kind}127.0.0.1:{cluster}"
    for token in ("", "wrong"):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        with pytest.raises(ConfigError, match=f"^engine.address={address}: .*set RAY_AUTH_TOKEN"):
            check_address(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    check_address(address)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("right\n")  # where Ray itself keeps one
    check_address(address)


def test_auto_looks_where_ray_noted_its_cluster(cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    check_address("auto")  # nothing is recorded: Ray may find one
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(f"127.0.0.1:{cluster}")
    with pytest.raises(ConfigError, match=r"^engine.address=auto: .*set RAY_AUTH_TOKEN"):
        check_address("auto")


@pytest.mark.parametrize(
    "address", ["foo", "host", "ray://host", "host:port", "host:0", "host:70000", "a b:1", "::1:5"]
)
def test_malformed_addresses_are_refused(address):
    with pytest.raises(ConfigError, match=r"must be auto, HOST:PORT or ray://HOST:PORT$"):
        check_address(address)


def test_an_address_without_a_service_is_a_one_line_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"no Ray cluster can be joined there: Connection refused$"):
            check_address(address)


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("address", [None, "auto"])
def test_a_token_that_is_there_is_used_where_ray_can_still_take_it(monkeypatch, address, imported):
    """Ray reads the mode on import. If it were set later, Ray's servers would require a token that its client does not send."""
    for key in ("RAY_USAGE_STATS_ENABLED", "RAY_DEDUP_LOGS_SKIP_REGEX", "RAY_AUTH_MODE"):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setitem(sys.modules, "ray", sys) if imported else monkeypatch.delitem(sys.modules, "ray", False)
    quiet_environment(address)
    assert (os.environ.get("RAY_AUTH_MODE") == "token") == (address is not None and not imported)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
