"""Check a Ray address before `ray.init`, to detect a malformed address, a machine that does not answer, or a rejected token.

In each case, Ray itself would retry for half a minute or more, and report the failure in many lines.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.ranges import RAY_ADDRESS

CONNECT_S = 10.0
ASKED = {  # a call without side effects for the service at each kind of address
    "ray://": "/ray.rpc.RayletDriver/ClusterInfo",
    "": "/ray.rpc.NodeInfoGcsService/CheckAlive",
}


def quiet_environment(address: str | None) -> None:
    """Set variables that Ray reads when it is imported: send no usage statistics, and use an existing token at `address`.

    For a cluster that it starts, or if it has already been imported, Ray handles the token itself.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # hide lines about lost workers, which the engine reports
    if address and "ray" not in sys.modules and _token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def check_address(address: str) -> None:
    """Raise ConfigError if no cluster can be joined at `address`, which is `auto`, `HOST:PORT` or `ray://HOST:PORT`."""
    found = RAY_ADDRESS.fullmatch(_started_here() if address == "auto" else address)
    if address == "auto" and not found:
        return  # Ray has other ways to find a cluster
    if not found or not 0 < int(found[3]) < 65536:
        raise ConfigError(f"engine.address={address}: must be auto, HOST:PORT or ray://HOST:PORT")
    host, port = found[2].strip("[]"), int(found[3])
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        raise refused(address, error.strerror or str(error)) from None
    if os.environ.get("RAY_USE_TLS", "0") == "0" and not _lets_in(f"{found[2]}:{port}", ASKED[found[1] or ""]):
        raise refused(address, "it refuses the token; set RAY_AUTH_TOKEN to the cluster's token")


def refused(address: str | None, reason: str) -> ConfigError:
    """Return the error for an address, or for this machine, that cannot be used."""
    what = (
        f"engine.address={address}: no Ray cluster can be joined there" if address else "engine=ray: Ray cannot start"
    )
    return ConfigError(f"{what}: {reason}")


def _lets_in(target: str, call: str) -> bool:
    """Return whether a service accepts fedloom's token, or requires none."""
    import grpc

    sent = [("authorization", f"Bearer {_token()}")] if _token() else []
    with grpc.insecure_channel(target) as channel:
        try:
            channel.unary_unary(call)(b"", timeout=CONNECT_S, metadata=sent)
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.UNAUTHENTICATED
    return True


def _started_here() -> str:
    """Return the address of the cluster that was started last on this machine, if Ray has recorded it."""
    note = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        return os.environ.get("RAY_ADDRESS") or note.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _token() -> str:
    """Return the token that Ray would use, from the environment or from a file, or "" if there is none."""
    given = os.environ.get("RAY_AUTH_TOKEN")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return (given or file.read_text(encoding="utf-8")).strip()
    except (OSError, UnicodeDecodeError):
        return ""
