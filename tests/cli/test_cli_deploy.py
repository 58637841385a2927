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
    for step in ("init", "server", "node", "run", "up"):
        assert f"fedloom deploy {step}" in shown.out
        assert cli("deploy", step, "--help").code == 0


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
