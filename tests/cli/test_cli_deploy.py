"""`fedloom deploy` with the inputs of a new user."""

import pytest


def test_a_folder_is_made_and_its_steps_are_shown(cli):
    done = cli("deploy", "init", "ward", "clients=5", "--nodes", "2", "--address", "fl.example.org")
    assert (done.code, done.err) == (0, "")
    assert "node-1  clients 2, 3, 4" in done.out
    assert "ward/README.md" in done.out
    again = cli("deploy", "init", "ward", "clients=5")
    assert again.code == 2
    assert "exists and is not empty" in again.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nod"], "unknown step 'nod' (did you mean 'node'?)"),
        (["up"], "give the number of nodes with --local N"),
        (["up", "--local", "0"], "--local 0: must be at least 1"),
        (["up", "--local", "x"], "invalid int value"),
        (["up", "--local", "2", "methd=fedavg"], "unknown key 'methd' (did you mean 'method'?)"),
        (["up", "--local", "20"], "--nodes 20: must be from 1 to the number of clients (10)"),
        (["up", "--local", "2", "engine=ray"], "engine=ray"),
        (["up", "--lokal", "2"], "has no option --lokal"),
        (["run"], "give a folder"),
        (["run", "nowhere"], "nowhere is not a federation's folder: federation.toml is missing"),
        (["run", "nowhere", "--resume", "x", "rounds=3"], "nowhere is not a federation's folder"),
        (["server", "nowhere"], "nowhere is not a federation's folder"),
        (["node", "nowhere"], "nowhere is not a node's folder: node.toml is missing"),
        (["init"], "give a folder"),
        (["init", "clients=3"], "give a folder"),
        (["init", ""], "give a folder"),
        (["init", "w", "--nodes", "99"], "--nodes 99"),
        (["init", "w", "--address", "fl.example.org:9092"], "--address fl.example.org:9092: must be a host name"),
        (["init", "w", "clients=3", "model=nonet.py:Net"], "model=nonet.py:Net: file nonet.py does not exist"),
        (["join"], "give a folder"),
        (["join", "Site"], "--name Site: must have at most 63 lower-case letters"),
        (["join", "s", "--authority", "x"], "--authority: applies only with --finish"),
        (["join", "s", "--finish", "none.join"], "none.join: file not found"),
        (["join", "s", "--finish", "none.join", "--name", "s"], "--name: applies only without --finish"),
        (["admit", "w", "a.csr"], "--clients"),
        (["admit", "w", "a.csr", "--clients", "0"], "a.csr cannot be read: No such file"),
        (["admit", "w", "--clients", "0"], "give a node's request"),
        (
            ["admit", "w", "a.csr", "--clients", "x"],
            "--clients x: must be numbers or ranges of clients, such as 5,6 or 0-3",
        ),
        (["admit", "w", "a.csr", "--clients", "0", "--authority", ""], "--authority must not be empty"),
        (["revoke", "w"], "give the name of a node"),
        (["revoke", "w", "a"], "w is not a federation's folder"),
        (["rotate", "w"], "give a node's request"),
        (["rotate", "w", "server"], "w is not a federation's folder"),
        (
            ["rotate", "w", "a.csr", "--address", "h"],
            "--address: applies only to: fedloom deploy rotate FOLDER server",
        ),
        (["audit", "w"], "w is not a federation's folder"),
    ],
)
def test_mistakes_end_in_one_line(cli, words, message):
    done = cli("deploy", *words)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err


def test_a_folder_that_is_taken_is_noticed_before_anything_starts(cli):
    assert cli("run", "rounds=1", "out=there", "--quiet").code == 0
    done = cli("deploy", "up", "--local", "2", "out=there")
    assert done.code == 2
    assert done.err == "fedloom: error: out=there: already exists and is not an empty folder; choose another folder\n"


def test_help_names_every_step(cli):
    shown = cli("deploy", "--help")
    assert shown.code == 0
    for step in ("init", "server", "node", "run", "up", "join", "admit", "revoke", "rotate", "audit"):
        assert f"fedloom deploy {step}" in shown.out
        assert cli("deploy", step, "--help").code == 0


def shown(done):
    """Return the lines of a command's output by their first word."""
    assert (done.code, done.err) == (0, "")
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in done.out.splitlines()}


def test_a_node_joins_is_renewed_and_revoked(cli):
    assert cli("deploy", "init", "ward", "clients=4", "--nodes", "0").code == 0
    asked = shown(cli("deploy", "join", "site-1"))
    admission = ("deploy", "admit", "ward", asked["request"], "--clients", "0-2,3")
    refused = cli(*admission)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert f"with --fingerprint {asked['fingerprint']}" in refused.err
    made = shown(cli(*admission, "--fingerprint", asked["fingerprint"]))
    assert made["node"] == "site-1 admitted; clients 0, 1, 2, 3"
    taking = ("deploy", "join", "site-1", "--finish", made["answer"], "--authority", made["authority"])
    assert "start the node: fedloom deploy node site-1" in shown(cli(*taking))["next"]
    assert "data=data: site-1/data does not exist" in cli("deploy", "node", "site-1").err
    new = shown(cli("deploy", "rotate", "site-1"))
    renewal = ("deploy", "rotate", "ward", new["request"], "--fingerprint", new["fingerprint"])
    assert "has a new key; the old key remains valid for one day" in shown(cli(*renewal))["node"]
    assert "already has this key" in shown(cli(*renewal))["node"]
    assert "restart the node: fedloom deploy node site-1" in shown(cli(*taking))["next"]
    assert "restart the server" in shown(cli("deploy", "rotate", "ward", "server"))["next"]
    assert "site-1 is revoked" in shown(cli("deploy", "revoke", "ward", "site-1"))["node"]
    assert shown(cli("deploy", "revoke", "ward", "site-1"))["node"] == "site-1 is already revoked"
    log = cli("deploy", "audit", "ward").out
    assert [line.split()[1] for line in log.splitlines()[:-1]] == [
        "create",
        "admit",
        "rotate",
        "rotate",
        "revoke",
        "revoke",
    ]


def test_a_run_without_a_server_says_how_to_start_it(cli):
    assert cli("deploy", "init", "ward", "clients=2", "--nodes", "1").code == 0
    done = cli("deploy", "run", "ward")
    assert done.code == 2
    assert "no SuperLink answers" in done.err
    assert "fedloom deploy server ward" in done.err


def test_an_empty_resume_does_not_start_a_new_run(cli):
    assert cli("deploy", "init", "ward", "clients=2", "--nodes", "1").code == 0
    done = cli("deploy", "run", "ward", "--resume", "")
    assert (done.code, done.err) == (2, "fedloom: error: fedloom deploy run: --resume must not be empty\n")


def test_the_flower_engine_is_not_for_simulations(cli):
    done = cli("run", "engine=flower")
    assert done.code == 2
    assert "see fedloom deploy" in done.err
