"""`fedloom deploy`."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NoReturn

from rich.console import Console

from fedloom.cli.executing import Finished, announce, conclude
from fedloom.cli.running import refuse_several, until_interrupted
from fedloom.cli.words import Parser, output, read_values, settings_words
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
  fedloom deploy run ward --resume runs/FOLDER    go on where it stopped
"""
USAGE = """\
fedloom deploy: the same method on real devices, through Flower (extra fedloom[flower])

  fedloom deploy init FOLDER [CONFIG.toml] [key=value ...] --nodes N --address HOST   keys, certificates, commands, service units
  fedloom deploy server FOLDER                         on the server: SuperLink behind its proxy
  fedloom deploy node FOLDER/node-0                    on a device: one node
  fedloom deploy run FOLDER [CONFIG.toml] [key=value ...]   on the server: one experiment on the nodes
  fedloom deploy up --local N [CONFIG.toml] [key=value ...]  all of it on this machine, for one experiment

each with --help; the steps from nothing to three machines are in docs/deployment.md"""


def deploy_command(words: Sequence[str]) -> int:
    """`fedloom deploy`."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] not in STEPS:
        raise ConfigError(f"fedloom deploy: '{words[0]}' is no step{suggest(words[0], STEPS)}")
    missing = [name for name in ("flwr", "cryptography") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"fedloom deploy needs {missing[0]}: pip install 'fedloom[flower]'")
    return STEPS[words[0]](words[1:])


def init_step(words: Sequence[str]) -> int:
    """`fedloom deploy init`."""
    from fedloom.deploy.folder import create_deployment

    parser = Parser("deploy init", "Write a federation's folder: nothing is overwritten.", INIT_EXAMPLES)
    parser.add_argument("folder", nargs="?", help="the new folder")
    settings_words(parser)
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="number of devices [3]")
    parser.add_argument(
        "--address",
        default="127.0.0.1",
        metavar="HOST[,HOST]",
        help="the server's names or addresses, the first for nodes",
    )
    given = parser.read(words)
    folder = _folder(given.folder, "init")
    made = create_deployment(
        folder, _one_experiment(read_values(given.words)), given.nodes, [h.strip() for h in given.address.split(",")]
    )
    console = output()
    console.print(f"folder  {folder}", soft_wrap=True)
    for node, clients in made.file.nodes.items():
        console.print(f"{node:<7} clients {', '.join(map(str, clients))}", soft_wrap=True)
    console.print(f"next    {folder / 'README.md'}", soft_wrap=True)
    return 0


def server_step(words: Sequence[str]) -> int:
    """`fedloom deploy server`."""
    from fedloom.deploy.folder import Deployment
    from fedloom.deploy.server import run_server

    given = _one_folder("server", "Run a federation's SuperLink and proxy until Ctrl-C.", words)
    run_server(Deployment(given))
    return 0


def node_step(words: Sequence[str]) -> int:
    """`fedloom deploy node`."""
    from fedloom.deploy.agent import run_node

    run_node(_one_folder("node", "Run one node on its device until Ctrl-C.", words))
    return 0


def run_step(words: Sequence[str]) -> int:
    """`fedloom deploy run`."""
    from fedloom.deploy.folder import Deployment, read_config

    parser = Parser("deploy run", "Run one experiment on a federation that is up.", RUN_EXAMPLES)
    parser.add_argument("folder", nargs="?", help="the federation's folder")
    _result_options(parser)
    parser.add_argument("--resume", metavar="RUN", help="an interrupted run's folder, to be continued")
    given = parser.read(words)
    given.step = "run"
    deployment = Deployment(_folder(given.folder, "run"))
    if given.resume is not None and given.words:
        raise ConfigError(f"'{given.words[0]}': --resume takes its settings from the run's folder alone")
    values = _one_experiment(_over(read_config(deployment.path), given.words))
    return _execute(deployment, values, given)


def up_step(words: Sequence[str]) -> int:
    """`fedloom deploy up`."""
    from fedloom.deploy.folder import check_plan, deployable
    from fedloom.deploy.local import local_federation

    parser = Parser(
        "deploy up", "Bring a federation up on this machine, run one experiment on it, take it down.", UP_EXAMPLES
    )
    parser.add_argument("--local", type=int, metavar="N", help="number of nodes, each a process with a key of its own")
    _result_options(parser)
    given = parser.read(words)
    given.resume, given.step = None, "up"
    if given.local is None:
        raise ConfigError("fedloom deploy up: say how many nodes with --local N")
    if given.local < 1:
        raise ConfigError(f"--local {given.local}: must be at least 1")
    values = {"checkpoint_every": 1, **_one_experiment(read_values(given.words))}
    settings = deployable(make_settings(values))
    check_plan(settings, given.local)
    if settings.out is not None:
        RunFolder.check_free(settings.out)
    with _ended_in_order():
        Console(stderr=True).print(f"starting a server and {given.local} nodes", highlight=False)
        with local_federation({k: v for k, v in values.items() if k != "out"}, given.local) as federation:
            return _execute(federation.deployment, values, given)


STEPS: Mapping[str, Callable[[Sequence[str]], int]] = MappingProxyType(
    {"init": init_step, "server": server_step, "node": node_step, "run": run_step, "up": up_step}
)


def _execute(deployment: Any, values: Values, given: Any) -> int:
    """One experiment on nodes, with progress, tables, page and exit code as `fedloom run` has them."""
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
            else resume_deployed(deployment, Path(given.resume), link, tell)
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

    if given.step == "up":  # its federation ends with it, so nothing can go on
        work()
    else:
        until_interrupted(work, f"fedloom deploy run {deployment.path} --resume {folder}")
    return conclude([Finished([folder])], folder, given.json, given.quiet)


def _result_options(parser: Parser) -> None:
    settings_words(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON on standard output, and nothing else"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress; print the folder alone")


def _one_folder(step: str, purpose: str, words: Sequence[str]) -> Path:
    parser = Parser(f"deploy {step}", purpose, f"  fedloom deploy {step} FOLDER\n")
    parser.add_argument("folder", nargs="?", help="its folder")
    return _folder(parser.read(words).folder, step)


def _folder(word: str | None, step: str) -> Path:
    if not word or "=" in word:
        raise ConfigError(f"fedloom deploy {step}: name a folder; see fedloom deploy {step} --help")
    return Path(word)


def _one_experiment(values: Values) -> Values:
    refuse_several(values)
    return values


def _over(values: Values, words: Sequence[str]) -> Values:
    """The federation's config, or the config file that is named, and `key=value` words over it."""
    from fedloom.config.parsing import from_words

    if any("=" not in word for word in words):
        return read_values(words)
    return from_words(words, values)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, so that its children are ended first."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
