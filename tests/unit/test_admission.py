"""Nodes that join by a request: requests, answers, revoked and replaced keys, and the audit log."""

import json
import ssl
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedloom.deploy import certificates
from fedloom.deploy.admission import OVERLAP, admit, revoke, rotate_node, rotate_server
from fedloom.deploy.audit import AuditLog
from fedloom.deploy.certificates import expiry, fingerprint_of, read_authority
from fedloom.deploy.files import FederationFile, NodeFile, read_file, with_nodes
from fedloom.deploy.folder import Deployment, create_deployment
from fedloom.deploy.joining import finish, request_new_key, request_to_join
from fedloom.deploy.node_keys import read_key
from fedloom.errors import ConfigError
from fedloom.experiment.lock import FolderLock


@pytest.fixture
def ward(tmp_path):
    """Create a federation of two clients, whose nodes join by requests."""
    return create_deployment(tmp_path / "ward", {"clients": 2}, 0, ["fl.example.org", "10.0.0.1"]).path


def joined(ward, name="site-1", clients=(0,)):
    """Let a node join. Return its folder, its fingerprint and the answer."""
    asked = request_to_join(ward.parent / name, name)
    made = admit(ward, asked.file, clients, asked.fingerprint)
    finish(ward.parent / name, made.answer, made.authority)
    return ward.parent / name, asked.fingerprint, made


def actions(ward):
    return [(line["action"], line["node"]) for line in AuditLog(ward / "server/audit.jsonl").read()]


def nodes(ward):
    return read_file(ward / "federation.toml", FederationFile, "a federation's folder").nodes


def test_a_node_that_joins_has_everything_and_its_private_key_stays_there(ward):
    node, mark, made = joined(ward)
    settings = read_file(node / "node.toml", NodeFile, "a node's folder")
    assert (settings.name, settings.server, settings.clients) == ("site-1", "fl.example.org:9092", [0])
    assert settings.data == "data"
    certificate = x509.load_pem_x509_certificate((node / "node.crt").read_bytes())
    ca = x509.load_pem_x509_certificate((node / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(ca)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert fingerprint_of(certificate.public_key()) == mark == made.fingerprint
    key = read_key(ward / "server/keys/site-1.pub")
    assert (key.public, key.until) == (certificate.public_key(), certificate.not_valid_after_utc)
    assert nodes(ward) == {"site-1": [0]}
    secrets = {(node / name).read_bytes() for name in ("node.key", "runtime.secret")}
    elsewhere = [file.read_bytes() for file in ward.rglob("*") if file.is_file()]
    assert not any(secret in content for secret in secrets for content in elsewhere)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (node, *node.iterdir(), *ward.rglob("*"))}
    assert set(modes.values()) == {0o600, 0o700}
    unit = (node / "fedloom-node.service").read_text()
    assert f'deploy node "{node}"' in unit
    ssl.create_default_context(cafile=str(node / "ca.crt"))
    assert Deployment(ward).active() == ["site-1"]


def test_each_command_can_be_repeated(ward):
    asked = request_to_join(ward.parent / "site-1", "site-1")
    assert request_to_join(ward.parent / "site-1", "site-1") == asked
    made = admit(ward, asked.file, [0], asked.fingerprint)
    answer = made.answer.read_bytes()
    assert admit(ward, asked.file, [0], asked.fingerprint) == replace(made, before=True)
    assert made.answer.read_bytes() == answer
    for _ in range(2):
        finish(ward.parent / "site-1", made.answer, made.authority)
    assert revoke(ward, "site-1") == [made.fingerprint]
    assert revoke(ward, "site-1") == []
    assert actions(ward) == [("create", ""), ("admit", "site-1"), ("revoke", "site-1")]


@pytest.mark.parametrize("left", ["key", "answer"])
def test_an_admission_that_was_interrupted_is_completed(ward, left):
    asked = request_to_join(ward.parent / "site-1", "site-1")
    before = (ward / "federation.toml").read_bytes()
    made = admit(ward, asked.file, [0], asked.fingerprint)
    if left == "key":
        (ward / "federation.toml").write_bytes(before)
    else:
        made.answer.unlink()
    again = admit(ward, asked.file, [0], asked.fingerprint)
    assert nodes(ward) == {"site-1": [0]}
    finish(ward.parent / "site-1", again.answer, again.authority)


def test_a_request_without_the_right_fingerprint_is_refused(ward):
    asked = request_to_join(ward.parent / "site-1", "site-1")
    with pytest.raises(ConfigError, match=r"repeat the command with --fingerprint SHA256:"):
        admit(ward, asked.file, [0], None)
    with pytest.raises(ConfigError, match=r"--fingerprint SHA256:other: the request has SHA256:.* not from the owner"):
        admit(ward, asked.file, [0], "SHA256:other")
    assert list((ward / "server").glob("keys/*")) == []
    assert AuditLog(ward / "server/audit.jsonl").read()[-1]["refused"] == "fingerprint SHA256:other"


def request(name="site-1", key=None, signer=None):
    key = key or certificates.new_node_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    return made.public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "is not a valid request of a node"),
        (b"", "is not a valid request of a node"),
        (b"x" * 70_000, "it has more than 65536 bytes"),
        (request(key=ec.generate_private_key(ec.SECP256R1())), "its key is not ECDSA P-384"),
        (request("../up"), "its name must have at most 63 lower-case letters"),
        (request("a.previous"), "its name must have"),
        (request("A"), "its name must have"),
        (request()[:-200] + request()[-200:], "is not a valid request of a node"),
    ],
)
def test_a_request_that_is_not_valid_is_refused(ward, content, message):
    file = ward.parent / "site.csr"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        admit(ward, file, [0], "SHA256:x")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        admit(ward, ward / "none.csr", [0], "SHA256:x")


@pytest.mark.parametrize(
    ("name", "clients", "message"),
    [
        (
            "site-1",
            [1],
            r"^site-1 is already admitted with another key; to replace the key, run: fedloom deploy rotate",
        ),
        ("site-2", [0], r"^--clients: client 0 is on site-1; revoke site-1 first"),
        ("site-2", [1, 1], r"^--clients 1,1: must be different numbers from 0"),
        ("site-2", [], r"^--clients : must be different numbers"),
    ],
)
def test_a_name_or_client_of_another_node_is_refused(ward, name, clients, message):
    joined(ward)
    before = {file: file.read_bytes() for file in ward.rglob("*") if file.is_file()}
    asked = request_to_join(ward.parent / "new", name)
    with pytest.raises(ConfigError, match=message):
        admit(ward, asked.file, clients, asked.fingerprint)
    assert {file: file.read_bytes() for file in ward.rglob("*") if file.is_file()} == before


def test_a_revoked_node_can_be_replaced_but_not_its_key(ward):
    node, mark, _ = joined(ward, clients=(0, 1))
    revoke(ward, "site-1")
    assert (Deployment(ward).revoked(), Deployment(ward).active()) == (["site-1"], [])
    assert not list((ward / "server/keys").iterdir())
    again = certificates.new_request(load(node / "node.key"), "site-1")
    (node / "again.csr").write_bytes(again)
    with pytest.raises(ConfigError, match=r"^site-1: its key was revoked or replaced; make a new key in a new folder"):
        admit(ward, node / "again.csr", [0], mark)
    joined(ward, "site-2", (1,))
    assert nodes(ward) == {"site-1": [0], "site-2": [1]}
    asked = request_to_join(ward.parent / "new", "site-1")
    admit(ward, asked.file, [0], asked.fingerprint)
    assert nodes(ward) == {"site-2": [1], "site-1": [0]}
    assert Deployment(ward).revoked() == []
    with pytest.raises(ConfigError, match=r"^site-9 is not a node of .*; its nodes are site-2, site-1"):
        revoke(ward, "site-9")


def load(file):
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    return load_ssh_private_key(file.read_bytes(), None)


def test_a_new_key_replaces_the_old_one_after_a_day(ward):
    node, old, _ = joined(ward)
    text = (node / "node.toml").read_text().replace('"data"', '"/srv/rows"')
    (node / "node.toml").write_text(text)
    asked = request_new_key(node)
    assert request_new_key(node) == asked
    assert fingerprint_of(load(node / "node.key").public_key()) == old  # until the answer is taken
    with pytest.raises(ConfigError, match="is already admitted with another key"):
        admit(ward, asked.file, [0], asked.fingerprint)
    made = rotate_node(ward, asked.file, asked.fingerprint)
    assert rotate_node(ward, asked.file, asked.fingerprint).before
    finish(node, made.answer, made.authority)
    assert fingerprint_of(load(node / "node.key").public_key()) == asked.fingerprint
    assert (node / "node.toml").read_text() == text
    assert not list(node.glob("*.next"))
    previous = read_key(ward / "server/keys/site-1.previous.pub")
    assert (fingerprint_of(previous.public), previous.node, previous.is_previous) == (old, "site-1", True)
    assert previous.is_valid(datetime.now(UTC) + OVERLAP - timedelta(minutes=1))
    assert not previous.is_valid(datetime.now(UTC) + OVERLAP)
    assert fingerprint_of(read_key(ward / "server/keys/site-1.pub").public) == asked.fingerprint
    third = request_new_key(node)
    rotate_node(ward, third.file, third.fingerprint)
    assert len(list((ward / "server/revoked").iterdir())) == 1  # the first key
    assert sorted(revoke(ward, "site-1")) == sorted([asked.fingerprint, third.fingerprint])
    assert actions(ward)[2:] == [("rotate", "site-1")] * 2 + [("revoke", "site-1")] * 2


def test_only_a_node_of_the_federation_gets_a_new_key(ward):
    asked = request_to_join(ward.parent / "site-1", "site-1")
    with pytest.raises(ConfigError, match=r"^site-1 is not admitted; to admit it, run"):
        rotate_node(ward, asked.file, asked.fingerprint)


OTHER = "the file of another node"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "site-1"', 'name = "site-2"', "the certificate is not for site-2"),
        (None, OTHER, "is not the answer to this node's request"),
        ("clients", "klients", "clients: field required"),
        ("fl.example.org:9092", "evil; rm -rf", "server: string should match"),
        ("-----BEGIN CERTIFICATE-----", "-----BEGIN NOTHING-----", "is not the answer to"),
        ("# Answer", "x" * 300_000, "it has more than"),
    ],
)
def test_an_answer_that_was_changed_is_refused(ward, old, new, message):
    asked = request_to_join(ward.parent / "site-1", "site-1")
    made = admit(ward, asked.file, [0], asked.fingerprint)
    _, _, other = joined(ward, "site-2", (1,))
    made.answer.write_text(other.answer.read_text() if new == OTHER else made.answer.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message) as error:
        finish(ward.parent / "site-1", made.answer, made.authority)
    assert "\n" not in str(error.value)
    assert not (ward.parent / "site-1/node.toml").exists()


def test_an_answer_of_another_authority_is_refused(ward, tmp_path):
    """Somebody who has copied the request, which is not secret, cannot take over the node."""
    other = create_deployment(tmp_path / "other", {"clients": 1}, 0).path
    asked = request_to_join(ward.parent / "site-1", "site-1")
    true = admit(ward, asked.file, [0], asked.fingerprint).authority
    false = admit(other, asked.file.rename(tmp_path / "copied.csr"), [0], asked.fingerprint)
    with pytest.raises(ConfigError, match=r"^the answer is from the authority .* repeat the command with --authority"):
        finish(ward.parent / "site-1", false.answer, None)
    with pytest.raises(ConfigError, match="it is not from your federation's operator"):
        finish(ward.parent / "site-1", false.answer, true)


def test_the_authority_may_be_elsewhere(ward):
    safe = (ward / "authority").rename(ward.parent / "safe")
    asked = request_to_join(ward.parent / "site-1", "site-1")
    with pytest.raises(ConfigError, match=r"authority/ca.key: No such file .* with --authority$"):
        admit(ward, asked.file, [0], asked.fingerprint)
    assert actions(ward) == [("create", "")]
    other = create_deployment(ward.parent / "other", {"clients": 1}, 0).path
    with pytest.raises(ConfigError, match="is not the authority of"):
        admit(ward, asked.file, [0], asked.fingerprint, other / "authority")
    admit(ward, asked.file, [0], asked.fingerprint, safe)
    (safe / "ca.key").write_bytes((other / "authority/ca.key").read_bytes())
    with pytest.raises(ConfigError, match=r"ca.key is not the key of ca.crt"):
        read_authority(safe)


def test_the_server_gets_a_new_certificate_for_the_same_names(ward):
    def names():
        certificate = x509.load_pem_x509_certificate((ward / "server/server.crt").read_bytes())
        certificate.verify_directly_issued_by(read_authority(ward / "authority").certificate)
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return certificate, {*san.get_values_for_type(x509.DNSName), *map(str, san.get_values_for_type(x509.IPAddress))}

    old, before = names()
    rotate_server(ward)
    new, after = names()
    assert before == after == {"fl.example.org", "10.0.0.1", "127.0.0.1", "localhost"}
    assert new.public_key() != old.public_key()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ward / "server/server.crt", ward / "server/server.key")
    rotate_server(ward, ["fl2.example.org"])
    assert names()[1] == {"fl2.example.org", "127.0.0.1", "localhost"}
    with pytest.raises(ConfigError, match="--address no host"):
        rotate_server(ward, ["no host"])


def test_certificates_warn_before_they_expire(ward, monkeypatch):
    file, now = ward / "server/server.crt", datetime.now(UTC)
    assert Deployment(ward).expiring() == []
    assert expiry(file, "x", now + timedelta(days=334)) == ""
    assert expiry(file, "rotate it", now + timedelta(days=336)).endswith("; renew it with: rotate it")
    with pytest.raises(ConfigError, match=r"server.crt expired on .*; renew it with: rotate it"):
        expiry(file, "rotate it", now + timedelta(days=366))
    monkeypatch.setattr(certificates, "DAYS", 20)
    monkeypatch.setattr(certificates._builder, "__defaults__", (20,))
    joined(ward)
    assert [line.split(":")[0] for line in Deployment(ward).expiring()] == ["site-1"]


def test_two_commands_do_not_change_a_federation_at_once(ward):
    asked = request_to_join(ward.parent / "site-1", "site-1")
    with FolderLock(ward / "server"), pytest.raises(Exception, match="is already being written by this process"):
        admit(ward, asked.file, [0], asked.fingerprint)


@pytest.mark.parametrize("name", ["", "UPPER", "a_b", "-a", "a" * 64, "../x"])
def test_a_name_that_is_not_allowed_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"^--name .*: must have at most 63 lower-case letters"):
        request_to_join(tmp_path / "x", name)
    assert not (tmp_path / "x").exists()


def test_a_folder_with_other_files_is_not_used(tmp_path, ward):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        request_to_join(tmp_path / "full", "full")
    request_to_join(tmp_path / "site", "a")
    with pytest.raises(ConfigError, match=r"already has the request a.csr"):
        request_to_join(tmp_path / "site", "b")
    node, _, _ = joined(ward)
    with pytest.raises(ConfigError, match=r"is already a node's folder; for a new key"):
        request_to_join(node, "site-1")


# the roster in federation.toml


def test_other_lines_and_comments_of_federation_toml_are_kept():
    text = '# mine\nhost = "h" # its name\nport = 1\n\n[nodes]\na = [\n    0,\n    1,\n]\nb = [2]\n\n[extra]\nx = 1\n'
    made = with_nodes(text, {"b c": [2], "d": [0, 1]})
    assert made == '# mine\nhost = "h" # its name\nport = 1\n\n[nodes]\n"b c" = [2]\nd = [0, 1]\n[extra]\nx = 1\n'


@pytest.mark.parametrize("text", ["nodes = {a = [0]}\n", 'host = "h"\n', "[nodes]\na = [0]\n[nodes.b]\nc = 1\n"])
def test_a_roster_that_cannot_be_edited_is_refused(text):
    with pytest.raises(ConfigError, match=r"nodes: must be a table \[nodes\]"):
        with_nodes(text, {"a": [1]})


def test_a_client_on_two_nodes_or_on_none_is_refused(ward):
    joined(ward, clients=(1,))
    with pytest.raises(ConfigError, match=r"client 0 is on no node; admit one with: .* --clients 0$"):
        Deployment(ward).check_complete()
    joined(ward, "site-2", (0,))
    Deployment(ward).check_complete()
    file = ward / "federation.toml"
    file.write_text(file.read_text().replace("site-2 = [0]", "site-2 = [1]"))
    with pytest.raises(ConfigError, match=r"each client must be on one node.*found \[1, 1\]"):
        Deployment(ward)


# the audit log


def test_the_audit_log_is_private_and_only_grows(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    assert (log.read(), log.digest()) == ([], "")
    for k in range(3):
        log.append("admit", f"site-{k}", "SHA256:x", clients=[k])
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600
    first, *_ = log.read()
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert (first["action"], first["node"], first["clients"], first["previous"]) == ("admit", "site-0", [0], "")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace("site-0", "site-9"), lines[2]], 3),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[1], lines[0], lines[2]], 1),
        (lambda lines: [*lines[:2], "junk\n"], 3),
        (lambda lines: [*lines[:2], lines[2][:-1]], 3),
        (lambda lines: [*lines[:2], json.dumps([1]) + "\n"], 3),
    ],
)
def test_a_changed_audit_log_is_refused(ward, change, line):
    file = ward / "server/audit.jsonl"
    log = AuditLog(file)
    for k in range(2):
        log.append("admit", f"site-{k}", "SHA256:x")
    file.write_text("".join(change(file.read_text().splitlines(keepends=True))))
    with pytest.raises(ConfigError, match=f"audit.jsonl: line {line} does not follow from the line before it"):
        log.read()
    asked = request_to_join(ward.parent / "site-1", "site-1")
    with pytest.raises(ConfigError, match="does not follow"):
        admit(ward, asked.file, [0], asked.fingerprint)
    assert not list((ward / "server").glob("keys/*"))
