"""`fedloom verify`, `--sign` and `--accept-changes`."""

import builtins
import json
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)  # fmt: skip

from fedloom.experiment.lock import FolderLock


def write_key(name, key=None, form=PrivateFormat.OpenSSH, secret=None):
    key = key or ed25519.Ed25519PrivateKey.generate()
    cover = BestAvailableEncryption(secret) if secret else NoEncryption()
    Path(name).write_bytes(key.private_bytes(Encoding.PEM, form, cover))
    Path(f"{name}.pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def test_a_run_prints_its_digest_and_is_verified(tiny, cli):
    printed = re.search(r"^digest  (\w{32})$", tiny("run", "out=mine").out, re.MULTILINE).group(1)
    done = cli("verify", "mine")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(rf"mine  ok  finished, round 2  digest {printed}\w{{32}}\n", done.out)
    Path("mine/summary.json").write_text("{}")
    done = cli("verify", "mine")
    assert (done.code, done.out) == (3, "")
    assert re.fullmatch(r"fedloom: mine/summary\.json has 2 bytes instead of \d+\n", done.err)


def test_a_comparison_is_verified_as_a_whole(tiny, cli):
    told = tiny("compare", "method=fedavg,local", "rounds=1", "out=both").out
    printed = re.search(r"^digest  (\w{32}) \(of all runs\)$", told, re.MULTILINE).group(1)
    done = cli("verify", "both")
    assert done.code == 0
    assert re.fullmatch(rf"both  ok  digest {printed}\w{{32}} \(of all runs\)", done.out.splitlines()[-1])
    file = Path("both/local-seed0/metrics.jsonl")
    file.write_text(file.read_text().replace("0.", "0.9", 1))
    done = cli("verify", "both")
    assert done.code == 3
    assert done.out.splitlines()[0].startswith("both/fedavg-seed0  ok")
    assert len(done.out.splitlines()) == 1
    assert done.err == f"fedloom: {file}: rows up to round 1 were changed after the run wrote them\n"


@pytest.mark.parametrize("kind", ["ed25519", "P-384", "PEM"])
def test_a_signature_shows_who_published_a_run(tiny, cli, kind):
    write_key("mine.key", ec.generate_private_key(ec.SECP384R1()) if kind != "ed25519" else None,
              PrivateFormat.PKCS8 if kind == "PEM" else PrivateFormat.OpenSSH)  # fmt: skip
    write_key("other.key")
    signed = tiny("run", "out=mine", "--sign", "mine.key").err.splitlines()[-1]
    fingerprint = re.fullmatch(r"fedloom: mine: signed by (SHA256:\S{43})", signed).group(1)
    assert cli("verify", "mine").out.endswith(f"  signed by {fingerprint}\n")
    assert cli("verify", "mine", "--key", "mine.key.pub").code == 0
    done = cli("verify", "mine", "--key", "other.key.pub")
    assert done.code == 3
    assert f"was made with another key ({fingerprint}), not with other.key.pub" in done.err
    edit_with_manifest(Path("mine"))
    done = cli("verify", "mine")
    assert done.code == 3
    assert "manifest.sig does not match manifest.json: the manifest was changed after it was signed" in done.err


def edit_with_manifest(run):
    """Edit a number and make the manifest agree, as somebody could who wants to deceive others."""
    from fedloom.experiment.manifest import entry, sealed

    summary = run / "summary.json"
    summary.write_text(summary.read_text().replace('"rounds": 2', '"rounds": 9'))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["finish"]["summary"] = entry(summary.read_bytes())
    del manifest["digest"]
    (run / "manifest.json").write_text(json.dumps(sealed(manifest)))


def test_keys_are_checked_before_the_run(tiny, cli, monkeypatch):
    write_key("secret.key", form=PrivateFormat.PKCS8, secret=b"1234")
    write_key("p256.key", ec.generate_private_key(ec.SECP256R1()))
    Path("no.key").write_text("no key")
    for name, said in (
        ("none.key", "--sign=none.key: cannot be read: No such file"),
        ("no.key", "--sign=no.key: must be an Ed25519 or P-384 private key in OpenSSH or PEM format"),
        ("p256.key", "--sign=p256.key: must be an Ed25519 or P-384 private key"),
        ("secret.key", "remove its passphrase with ssh-keygen -p on a copy"),
    ):
        done = tiny("run", "out=mine", "--sign", name)
        assert done.code == 2
        assert said in done.err
        assert not Path("mine").exists()
    assert tiny("run", "out=mine", "--quiet").code == 0
    write_key("good.key")
    assert "is missing, so the run is not signed" in cli("verify", "mine", "--key", "good.key.pub").err
    assert "--key=good.key: must be an Ed25519 or P-384 public key" in cli("verify", "mine", "--key", "good.key").err
    real = builtins.__import__

    def without(name, *args):
        if name == "cryptography":
            raise ImportError
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    done = tiny("run", "out=another", "--sign", "good.key")
    assert done.err == (
        "fedloom: error: --sign: requires the package cryptography, which is not installed; pip install 'fedloom[flower]'\n"
    )


def test_changes_are_accepted_with_a_flag_and_shown(tiny, cli):
    from fedloom.config.settings import make_settings
    from fedloom.experiment.loop import Experiment
    from small import SMALL, changed, interrupted_after

    interrupted_after(Experiment(make_settings(changed(SMALL, checkpoint_every=1, engine="sequential", out="cut"))), 1)
    config = Path("cut/config.toml")
    config.write_text(config.read_text().replace("batch_size = 16", "batch_size = 8"))
    done = cli("run", "--resume", "cut")
    assert done.code == 2
    assert done.err == (
        "fedloom: error: cut: its config.toml was edited: batch_size=8 (was 16);"
        " undo this, or resume with --accept-changes (accept_changes=True in Python)\n"
    )
    done = cli("run", "--resume", "cut", "--accept-changes")
    assert done.code == 0
    assert "Resumed with other settings, code or versions: cut." in " ".join(done.out.split())
    assert "its config.toml was edited: batch_size=8 (was 16)" in Path("cut/report.html").read_text()
    assert cli("run", "--accept-changes").err == (
        "fedloom: error: --accept-changes: applies only to fedloom run --resume FOLDER\n"
    )


def test_a_folder_that_is_being_written_is_refused(tiny, cli):
    assert tiny("compare", "method=local", "rounds=1", "out=both", "--quiet").code == 0
    with FolderLock(Path("both")):
        done = cli("compare", "--resume", "both")
    assert done.code == 2
    assert "both is already being written" in done.err


def test_what_verify_needs(cli):
    assert cli("verify").err == "fedloom: error: fedloom verify: give the folder of a run, such as runs/mine\n"
    assert "is neither a run folder" in cli("verify", ".").err
    shown = cli("verify", "--help")
    assert shown.code == 0
    assert "exit codes: 0 all files are as the run wrote them; 3 they are not" in shown.out
