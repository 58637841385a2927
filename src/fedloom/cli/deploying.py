"""The command `fedloom deploy` and its steps."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NoReturn

from rich.console import Console

from fedloom.cli.admitting import admit_step, audit_step, join_step, revoke_step, rotate_step
from fedloom.cli.executing import Finished, announce, conclude
from fedloom.cli.running import refuse_several, until_interrupted
from fedloom.cli.words import Parser, accept_option, output, read_values, settings_words
from fedloom.config.settings import Values, make_settings
from fedloom.errors import ConfigError, suggest
from fedloom.experiment.progress import facts, live
from fedloom.experiment.run_folder import RunFolder

INIT_EXAMPLES = """\
  fedloom deploy init ward method=fedrir clients=3 --nodes 3 --address fl.example.org
  fedloom deploy init ward experiment.toml --nodes 3 --address fl.example.org,192.0.2.7
  fedloom deploy init lab method=fedrir clients=12 --nodes 4 --address 192.168.1.10
"""
UP_EXAMPLES = """\
  fedloom deploy up --local 3                                     FedAvg on digits, three nodes, TLS and node keys
  fedloom deploy up --local 3 method=fedrir clients=9 rounds=5 --json
"""
RUN_EXAMPLES = """\
  fedloom deploy run ward                         the experiment of ward/config.toml
  fedloom deploy run ward rounds=50 method.lr=0.01
  fedloom deploy run ward --resume runs/FOLDER    continue an interrupted run
"""
USAGE = """\
fedloom deploy: run a method on real devices with Flower (needs fedloom[flower])

  fedloom deploy init FOLDER [CONFIG.toml] [key=value ...] --nodes N --address HOST   keys, certificates, commands, service units
  fedloom deploy server FOLDER                         on the server: run SuperLink and its proxy
  fedloom deploy node FOLDER/node-0                    on a device: run one node
  fedloom deploy run FOLDER [CONFIG.toml] [key=value ...]   on the server: run one experiment on the nodes
  fedloom deploy up --local N [CONFIG.toml] [key=value ...]  on this machine: start everything, run one experiment, stop

  fedloom deploy join FOLDER                           on a device: make a key and a request to join, or take the answer
  fedloom deploy admit FOLDER REQUEST --clients LIST   on the server: admit a node by its request
  fedloom deploy revoke FOLDER NODE                    on the server: refuse a node from now on
  fedloom deploy rotate FOLDER [REQUEST | server]      on a device or the server: replace keys and certificates
  fedloom deploy audit FOLDER                          on the server: show who was admitted, revoked or renewed

Each step has --help. docs/deployment.md explains how to set up three machines."""


def deploy_command(words: Sequence[str]) -> int:
    """Run `fedloom deploy` and return its exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] not in STEPS:
        raise ConfigError(f"fedloom deploy: unknown step '{words[0]}'{suggest(words[0], STEPS)}")
    missing = [name for name in ("flwr", "cryptography") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"fedloom deploy needs {missing[0]}: pip install 'fedloom[flower]'")
    from fedloom.deploy.services import no_loopback_proxy

    os.environ.update(no_loopback_proxy(os.environ))  # for Flower's HTTP clients in this process
    return STEPS[words[0]](words[1:])


def init_step(words: Sequence[str]) -> int:
    """Run `fedloom deploy init` and return its exit code."""
    from fedloom.deploy.folder import create_deployment

    parser = Parser(
        "deploy init", "Create the folder of a federation. Existing files are never overwritten.", INIT_EXAMPLES
    )
    parser.add_argument("folder", nargs="?", help="the new folder")
    settings_words(parser)
    parser.add_argument(
        "--nodes", type=int, default=3, metavar="N", help="number of devices [3]; 0: all join by requests"
    )
    parser.add_argument(
        "--address",
        default="127.0.0.1",
        metavar="HOST[,HOST]",
        help="host names or addresses of the server; nodes connect to the first",
    )
    parser.add_argument(
        "--demo", action="store_true", help="nodes use the examples of the config instead of their own (for tests)"
    )
    parser.add_argument("--nginx", action="store_true", help="write a config for nginx in front of the server's proxy")
    given = parser.read(words)
    folder = _folder(given.folder, "init")
    hosts = [h.strip() for h in given.address.split(",")]
    values = _one_experiment(read_values(given.words))
    made = create_deployment(folder, values, given.nodes, hosts, demo=given.demo, nginx=given.nginx)
    console = output()
    console.print(f"folder  {folder}", soft_wrap=True)
    for node, clients in made.file.nodes.items():
        console.print(f"{node:<7} clients {', '.join(map(str, clients))}", soft_wrap=True)
    console.print(f"next    {folder / 'README.md'}", soft_wrap=True)
    return 0


def server_step(words: Sequence[str]) -> int:
    """Run `fedloom deploy server` and return its exit code."""
    from fedloom.deploy.folder import Deployment
    from fedloom.deploy.server import run_server

    parser = _folder_parser("server", "Run a federation's SuperLink and proxy until Ctrl-C.")
    parser.add_argument(
        "--keep-store",
        action="store_true",
        help="keep the SuperLink's messages on disk, if memory is too small for them",
    )
    given = parser.read(words)
    run_server(Deployment(_folder(given.folder, "server")), keep_store=given.keep_store)
    return 0


def node_step(words: Sequence[str]) -> int:
    """Run `fedloom deploy node` and return its exit code."""
    from fedloom.deploy.agent import run_node

    parser = _folder_parser("node", "Run one node on its device until Ctrl-C.")
    run_node(_folder(parser.read(words).folder, "node"))
    return 0


def run_step(words: Sequence[str]) -> int:
    """Run `fedloom deploy run` and return its exit code."""
    from fedloom.deploy.folder import Deployment, read_config

    parser = Parser("deploy run", "Run one experiment on a running federation.", RUN_EXAMPLES)
    parser.add_argument("folder", nargs="?", help="the federation's folder")
    _result_options(parser)
    parser.add_argument("--resume", metavar="RUN", help="folder of an interrupted run, to continue it")
    accept_option(parser)
    given = parser.read(words)
    given.step = "run"
    deployment = Deployment(_folder(given.folder, "run"))
    if given.resume is not None and given.words:
        raise ConfigError(f"'{given.words[0]}': --resume takes all settings from the run folder; remove this argument")
    values = _one_experiment(_overridden(read_config(deployment.path), given.words))
    return _execute(deployment, values, given)


def up_step(words: Sequence[str]) -> int:
    """Run `fedloom deploy up` and return its exit code."""
    from fedloom.deploy.folder import check_plan, deployable
    from fedloom.deploy.local import local_federation

    parser = Parser(
        "deploy up", "Start a federation on this machine, run one experiment on it, and stop it.", UP_EXAMPLES
    )
    parser.add_argument("--local", type=int, metavar="N", help="number of nodes; each is a process with its own key")
    _result_options(parser)
    given = parser.read(words)
    given.resume, given.step = None, "up"
    if given.local is None:
        raise ConfigError("fedloom deploy up: give the number of nodes with --local N")
    if given.local < 1:
        raise ConfigError(f"--local {given.local}: must be at least 1")
    values = {"checkpoint_every": 1, **_one_experiment(read_values(given.words))}
    settings = deployable(make_settings(values))
    check_plan(settings, given.local)
    if settings.out is not None:
        RunFolder.check_free(settings.out)
    with _sigterm_as_exit():
        Console(stderr=True).print(f"starting a server and {given.local} nodes", highlight=False)
        with local_federation({k: v for k, v in values.items() if k != "out"}, given.local) as federation:
            return _execute(federation.deployment, values, given)


STEPS: Mapping[str, Callable[[Sequence[str]], int]] = MappingProxyType(
    {
        "init": init_step,
        "server": server_step,
        "node": node_step,
        "run": run_step,
        "up": up_step,
        "join": join_step,
        "admit": admit_step,
        "revoke": revoke_step,
        "rotate": rotate_step,
        "audit": audit_step,
    }
)


def _execute(deployment: Any, values: Values, given: Any) -> int:
    """Run one experiment on the nodes, with the progress, tables, report and exit code of `fedloom run`."""
    from fedloom.deploy.grid import GridLink
    from fedloom.deploy.running import prepare, resume_deployed

    console = Console(stderr=True)
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        console.print(f"fedloom: {line}", highlight=False, markup=False, soft_wrap=True)

    link = GridLink(deployment, tell)
    try:
        experiment = (
            prepare(deployment, values, link, tell)
            if given.resume is None
            else resume_deployed(deployment, Path(given.resume), link, tell, given.accept_changes)
        )
    except BaseException:
        link.close()
        raise
    folder = experiment.folder.path
    label = experiment.settings.label or experiment.settings.method.name

    def work() -> None:
        if given.quiet:
            experiment.run()
            return
        announce({"method": label, **facts(experiment)})
        with live(label, console, done=experiment.done) as show:
            experiment.run(show)

    if given.step == "up":  # the federation stops together with the run, which therefore cannot be resumed
        work()
    else:
        until_interrupted(work, f"fedloom deploy run {deployment.path} --resume {folder}")
    return conclude([Finished([folder])], folder, given.json, given.quiet)


def _result_options(parser: Parser) -> None:
    settings_words(parser)
    parser.add_argument("--json", action="store_true", help="print only the summary, as JSON, to standard output")
    parser.add_argument("--quiet", action="store_true", help="print no progress and no tables, only the folder")


def _folder_parser(step: str, purpose: str) -> Parser:
    parser = Parser(f"deploy {step}", purpose, f"  fedloom deploy {step} FOLDER\n")
    parser.add_argument("folder", nargs="?", help="folder of the server or the node")
    return parser


def _folder(word: str | None, step: str) -> Path:
    if not word or "=" in word:
        raise ConfigError(f"fedloom deploy {step}: give a folder; see fedloom deploy {step} --help")
    return Path(word)


def _one_experiment(values: Values) -> Values:
    refuse_several(values)
    return values


def _overridden(values: Values, words: Sequence[str]) -> Values:
    """Return the federation's config, changed by arguments. A config file among the arguments replaces that config."""
    from fedloom.config.parsing import from_words

    if any("=" not in word for word in words):
        return read_values(words)
    return from_words(words, values)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so that child processes are stopped first."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
