"""The steps of `fedloom deploy` with which nodes join a federation, and with which operators admit, revoke and renew nodes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedloom.cli.words import Parser, output, refuse_empty
from fedloom.errors import ConfigError

JOIN_EXAMPLES = """\
  fedloom deploy join /etc/fedloom/site-3                                          a key, and a request for the operator of the server
  fedloom deploy join /etc/fedloom/site-3 --finish site-3.join --authority SHA256:...   take the operator's answer
"""
ADMIT_EXAMPLES = """\
  fedloom deploy admit ward site-3.csr --clients 5,6                               shows the fingerprint of the request
  fedloom deploy admit ward site-3.csr --clients 5,6 --fingerprint SHA256:...      admits the node, and writes site-3.join
"""
REVOKE_EXAMPLES = """\
  fedloom deploy revoke ward site-3
"""
ROTATE_EXAMPLES = """\
  fedloom deploy rotate /etc/fedloom/site-3                                on a device: a new key, and a request
  fedloom deploy rotate ward site-3.csr --fingerprint SHA256:...           on the server: the new key replaces the old one in a day
  fedloom deploy rotate ward server                                        on the server: a new key and certificate of the server
"""
AUDIT_EXAMPLES = """\
  fedloom deploy audit ward
"""


def join_step(words: Sequence[str]) -> int:
    """Run `fedloom deploy join` and return its exit code."""
    from fedloom.deploy.joining import finish, request_to_join

    parser = _parser("join", "On a device: join a federation. The private key never leaves the device.", JOIN_EXAMPLES)
    parser.add_argument("--name", help="name of the node [the folder's name]")
    parser.add_argument("--finish", metavar="FILE", help="the operator's answer")
    parser.add_argument("--authority", metavar="SHA256:...", help="fingerprint of the federation's authority")
    given = parser.read(words)
    folder = _folder(given, "join")
    if given.finish is None:
        if given.authority is not None:
            raise ConfigError("--authority: applies only with --finish")
        made = request_to_join(folder, given.name if given.name is not None else folder.resolve().name)
        _show(
            ("request", made.file),
            ("fingerprint", made.fingerprint),
            ("next", "send the request to the operator of the server, and compare the fingerprint with them"),
        )
        return 0
    if given.name is not None:
        raise ConfigError("--name: applies only without --finish, because the answer contains the node's name")
    node, is_renewal = finish(folder, Path(given.finish), given.authority)
    start = f"fedloom deploy node {folder}"
    _show(
        ("node", f"{node.name}, clients {', '.join(map(str, node.clients))}"),
        ("server", node.server),
        (
            "next",
            f"restart the node: {start}"
            if is_renewal
            else f"set data in {folder / 'node.toml'}, then start the node: {start}",
        ),
    )
    return 0


def admit_step(words: Sequence[str]) -> int:
    """Run `fedloom deploy admit` and return its exit code."""
    from fedloom.config.settings import make_settings
    from fedloom.deploy.admission import admit
    from fedloom.deploy.folder import code_files, read_config

    parser = _parser("admit", "On the server: admit a node by its request.", ADMIT_EXAMPLES)
    parser.add_argument("request", nargs="?", help="the node's request")
    parser.add_argument("--clients", required=True, metavar="LIST", help="numbers of its clients, such as 5,6 or 0-3")
    _signing_options(parser)
    given = parser.read(words)
    folder = _folder(given, "admit")
    made = admit(folder, _request(given, "admit"), _clients(given.clients), given.fingerprint, _authority(given))
    _show_admitted(made, "was admitted before" if made.before else "admitted")
    for file in code_files(make_settings(read_config(folder))):
        _show(("code", f"the config uses {file}; copy it to the node's folder code/"))
    return 0


def revoke_step(words: Sequence[str]) -> int:
    """Run `fedloom deploy revoke` and return its exit code."""
    from fedloom.deploy.admission import revoke

    parser = _parser("revoke", "On the server: refuse a node from now on.", REVOKE_EXAMPLES)
    parser.add_argument("name", nargs="?", help="name of the node")
    given = parser.read(words)
    folder = _folder(given, "revoke")
    if not given.name:
        raise ConfigError("fedloom deploy revoke: give the name of a node; see fedloom deploy revoke --help")
    prints = revoke(folder, given.name)
    if not prints:
        _show(("node", f"{given.name} is already revoked"))
    for each in prints:
        _show(("node", f"{given.name} is revoked"), ("fingerprint", each))
    return 0


def rotate_step(words: Sequence[str]) -> int:
    """Run `fedloom deploy rotate` and return its exit code."""
    from fedloom.deploy.admission import rotate_node, rotate_server
    from fedloom.deploy.certificates import fingerprint_of
    from fedloom.deploy.joining import request_new_key

    parser = _parser("rotate", "Replace a node's key, or the server's key and certificate.", ROTATE_EXAMPLES)
    parser.add_argument("request", nargs="?", help="on the server: a node's request, or the word server")
    parser.add_argument("--address", metavar="HOST[,HOST]", help="new host names or addresses of the server")
    _signing_options(parser)
    given = parser.read(words)
    folder = _folder(given, "rotate")
    if given.address is not None and given.request != "server":
        raise ConfigError("--address: applies only to: fedloom deploy rotate FOLDER server")
    if (folder / "node.toml").is_file():
        if given.request or given.fingerprint or given.authority:
            raise ConfigError(
                f"{folder} is a node's folder; give only the folder, and send the request to the operator"
            )
        made = request_new_key(folder)
        _show(
            ("request", made.file),
            ("fingerprint", made.fingerprint),
            ("next", "send the request to the operator of the server; then: fedloom deploy join ... --finish"),
        )
    elif given.request == "server":
        hosts = [host.strip() for host in given.address.split(",")] if given.address is not None else []
        new = rotate_server(folder, hosts, _authority(given))
        _show(
            ("fingerprint", fingerprint_of(new.key.public_key())),
            ("until", f"{new.certificate.not_valid_after_utc:%Y-%m-%d}"),
            ("next", f"restart the server: fedloom deploy server {folder}"),
        )
    else:
        admitted = rotate_node(folder, _request(given, "rotate"), given.fingerprint, _authority(given))
        _show_admitted(
            admitted,
            "already has this key" if admitted.before else "has a new key; the old key remains valid for one day",
        )
    return 0


def audit_step(words: Sequence[str]) -> int:
    """Run `fedloom deploy audit` and return its exit code."""
    from fedloom.deploy.audit import AuditLog
    from fedloom.deploy.folder import Deployment

    parser = _parser("audit", "On the server: check and show who was admitted, revoked or renewed.", AUDIT_EXAMPLES)
    log = AuditLog.of(Deployment(_folder(parser.read(words), "audit")).path)
    console = output()
    for line in log.read():
        known = ("time", "by", "action", "node", "fingerprint", "previous")
        rest = "  ".join(f"{key} {value}" for key, value in line.items() if key not in known)
        words_ = (str(line.get(key, "")) for key in ("time", "action", "node", "fingerprint"))
        console.print("  ".join([*filter(None, words_), f"by {line.get('by')}", rest]).rstrip(), soft_wrap=True)
    console.print(f"digest  {log.digest()}", soft_wrap=True)
    return 0


def _parser(step: str, purpose: str, examples: str) -> Parser:
    parser = Parser(f"deploy {step}", purpose, examples)
    parser.add_argument("folder", nargs="?", help="folder of the node or of the federation")
    return parser


def _signing_options(parser: Parser) -> None:
    parser.add_argument("--fingerprint", metavar="SHA256:...", help="fingerprint of the request, from the node's owner")
    parser.add_argument("--authority", metavar="FOLDER", help="folder with ca.key and ca.crt [FEDERATION/authority]")


def _folder(given: Any, step: str) -> Path:
    if not given.folder:
        raise ConfigError(f"fedloom deploy {step}: give a folder; see fedloom deploy {step} --help")
    return Path(given.folder)


def _request(given: Any, step: str) -> Path:
    if not given.request:
        raise ConfigError(f"fedloom deploy {step}: give a node's request; see fedloom deploy {step} --help")
    return Path(given.request)


def _authority(given: Any) -> Path | None:
    if given.authority is None:
        return None
    refuse_empty({"--authority": given.authority})
    return Path(given.authority)


def _clients(text: str) -> list[int]:
    """Return the numbers in a list such as `0-3,7`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if not match:
            raise ConfigError(f"--clients {text}: must be numbers or ranges of clients, such as 5,6 or 0-3")
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1)
    return found


def _show_admitted(made: Any, what: str) -> None:
    _show(
        ("node", f"{made.name} {what}; clients {', '.join(map(str, made.clients))}"),
        ("fingerprint", made.fingerprint),
        ("answer", made.answer),
        ("authority", made.authority),
        (
            "next",
            f"on the node: fedloom deploy join FOLDER --finish {made.answer.name} --authority {made.authority}",
        ),
    )


def _show(*lines: tuple[str, Any]) -> None:
    console = output()
    for name, value in lines:
        console.print(f"{name:<12} {value}", soft_wrap=True)
