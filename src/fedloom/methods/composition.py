"""Compose two methods: the server's half of one and the clients' half of the other."""

from __future__ import annotations

import dataclasses
import inspect

from fedloom.errors import ConfigError
from fedloom.method import Method


def half(side: str) -> tuple[str, ...]:
    """Return the names of the hooks of `Method` that belong to one half, `server` or `client`. Each hook is marked with its half."""
    found = ((name, getattr(value, "fget", value)) for name, value in vars(Method).items())
    return tuple(name for name, hook in found if getattr(hook, "side", None) == side)


SERVER_HALF = half("server")
CLIENT_HALF = (*half("client"), "shared", "keeps_shared")
BASIC = {field.name for field in dataclasses.fields(Method)}  # hyper-parameters of local training


def compose(server: Method, client: Method) -> Method:
    """Return a method with the server of `server` and the clients of `client`, e.g. `compose(server=FedMR(), client=FedProx())`.

    The hyper-parameters that all methods have (`lr`, `local_epochs`, ...) are taken from `client`.

    Raises:
        ConfigError: the two methods cannot be composed.
    """
    cls = composed(type(server), type(client))
    own = {f.name: getattr(server, f.name) for f in dataclasses.fields(server) if f.name not in BASIC}
    return cls(**own, **dataclasses.asdict(client))


def composed(server: type[Method], client: type[Method]) -> type[Method]:
    """Return the class of a composed method; it has the hyper-parameters of both methods.

    Raises:
        ConfigError: `client` overrides a server hook, `server` overrides a client hook, or both define the same name.
    """
    a, b = server.__name__, client.__name__
    _refuse(server, CLIENT_HALF, f"method={a}+{b}: {a} cannot be the server's half, because it overrides client hooks")
    _refuse(client, SERVER_HALF, f"method={a}+{b}: {b} cannot be the clients' half, because it overrides server hooks")
    twice = (_own_names(server) & _own_names(client)) - _own_names(Method)
    if server.pooled or client.pooled or not client.shared or twice:
        what = f"both define '{min(twice)}'" if twice else "one of them is not a federated method"
        raise ConfigError(f"method={a}+{b}: {what}")
    name = f"{a}{b}"
    locally = [(f.name, f.type, f.default) for f in dataclasses.fields(client) if f.name in BASIC]
    text = f"{a}'s server with {b}'s clients.\n\n{inspect.getdoc(server)}\n\n{inspect.getdoc(client)}"
    namespace = {"__doc__": text, "__module__": Method.__module__, "paper": getattr(server, "paper", None)}
    namespace |= {"accepts_late": server.accepts_late, "equal_shares": server.equal_shares}
    found: type[Method] = dataclasses.make_dataclass(
        name, locally, bases=(server, client), namespace=namespace, frozen=True
    )
    return found


def _refuse(cls: type[Method], half: tuple[str, ...], why: str) -> None:
    own = [name for name in half if getattr(cls, name) is not getattr(Method, name)]
    if own:
        raise ConfigError(f"{why} ({', '.join(own)})")


def _own_names(cls: type[Method]) -> set[str]:
    """Return the names that a class defines or inherits from bases derived from Method."""
    bases = cls.__mro__[: cls.__mro__.index(Method)] or (Method,)
    return {name for base in bases for name in vars(base) if not name.startswith("__") and name != "paper"}
