"""The command `fedloom verify`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedloom.cli.words import Parser
from fedloom.errors import ConfigError
from fedloom.experiment.manifest import combined_digest
from fedloom.experiment.verifying import Verdict, run_folders, verify

EXAMPLES = """\
  fedloom verify runs/mine                             one run, finished or interrupted (not while it is running)
  fedloom verify runs/digits                           all runs of a comparison
  fedloom verify runs/mine --key alice.pub             it must also be signed with this key (fedloom run --sign KEY)

Without a signature, this finds accidents: damaged, lost, mixed-up and edited files. Anybody can edit a file together with its
manifest; compare the digest with the published one, or sign.
exit codes: 0 all files are as the run wrote them; 3 they are not; 2 usage error
"""
DIFFERENT = 3  # exit code


def verify_command(words: Sequence[str]) -> int:
    """Run `fedloom verify` and return its exit code."""
    parser = Parser(
        "verify", "Check that run folders hold exactly what their runs wrote. Nothing is changed.", EXAMPLES
    )
    parser.add_argument("run", nargs="*", metavar="RUN", help="a run folder, or a folder of run folders")
    parser.add_argument("--key", metavar="PUBLIC", help="public key that must have signed the runs (OpenSSH or PEM)")
    given = parser.read(words)
    if not given.run:
        raise ConfigError("fedloom verify: give the folder of a run, such as runs/mine")
    found = {path: run_folders(path) for path in map(Path, given.run)}
    intact = [_verify_all(path, folders, given.key) for path, folders in found.items()]
    return 0 if all(intact) else DIFFERENT


def _verify_all(path: Path, folders: Sequence[Path], key: str | None) -> bool:
    """Verify the runs in a folder, and show the result for each run. Return whether all runs are unchanged."""
    verdicts = {folder.relative_to(path).as_posix(): verify(folder, key) for folder in folders}
    for folder, verdict in zip(folders, verdicts.values(), strict=True):
        _show(folder, verdict)
    intact = not any(verdict.problems for verdict in verdicts.values())
    if intact and list(folders) != [path]:
        digests = {name: verdict.digest for name, verdict in verdicts.items()}
        print(f"{path}  ok  digest {combined_digest(digests)} (of all runs)")
    return intact


def _show(folder: Path, verdict: Verdict) -> None:
    for problem in verdict.problems:
        print(f"fedloom: {problem}", file=sys.stderr)
    for note in verdict.notes:
        print(f"fedloom: note: {folder}: {note}", file=sys.stderr)
    if not verdict.problems:
        signed = f"  signed by {verdict.signer}" if verdict.signer else ""
        print(f"{folder}  ok  {verdict.state}  digest {verdict.digest}{signed}")
