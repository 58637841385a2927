"""Input that newcomers type: terms of papers and other tools, wrong case, spaces, and a file instead of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

OWN = "from fedloom import Method\n\n\nclass HeadFirst(Method):\n    pass\n"
HINTS = {
    "run lr=0.1": "unknown key 'lr' (did you mean 'method.lr'?)",
    "run learning_rate=0.1": "unknown key 'learning_rate' (did you mean 'method.lr'?)",
    "run method.learning_rate=0.1": "fedavg has no such hyper-parameter (did you mean 'lr'?)",
    "run alpha=0.5": "(did you mean 'partition.alpha'",
    "run client=1": "(did you mean 'clients'?)",
    "run num_clients=5": "(did you mean 'clients'?)",
    "run epochs=5": "(did you mean 'method.local_epochs'?)",
    "run bs=32": "(did you mean 'batch_size'?)",
    "run mu=0.1": "(did you mean 'method.mu'?)",
    "run frac=0.1": "(did you mean 'participation'?)",
    "run dataset=mnist": "(did you mean 'data'?)",
    "run device=cuda": "(did you mean 'engine.device'?)",
    "run path=x.csv": "(did you mean 'data.path' or 'partition.path'?)",
    "run Rounds=5": "(did you mean 'rounds'?)",
    "run ROUNDS=5": "(did you mean 'rounds'?)",
    "run partition.Alpha=1": "unknown key 'partition.Alpha' (did you mean 'alpha'?)",
    "run resume=runs/x": "(did you mean the option '--resume'?)",
    "run old.toml": "unknown key 'lr' (did you mean 'method.lr'?)",
    "run --rounds 5": "fedloom run has no option --rounds; write rounds=5",
    "run --rounds=5": "fedloom run has no option --rounds; write rounds=5",
    "run --lr 0.1": "fedloom run has no option --lr; write method.lr=0.1",
    "run --gpu 0": "fedloom run has no option --gpu; write engine.device=cuda",
    "run --alpha": "fedloom run has no option --alpha; write partition.alpha=VALUE",
    "report --out x.html full": "fedloom report has no option --out; write out=x.html",
    "run rounds = 5": "'rounds = 5': write rounds=5, without spaces",
    "run rounds =5": "'rounds =5': write rounds=5, without spaces",
    "run rounds= 5": "'rounds= 5': write rounds=5, without spaces",
    "run rounds: 5": "'rounds: 5': write rounds=5, without spaces",
    "run rounds:5": "'rounds:5': write rounds=5, without spaces",
    "run method=FedRIR": "method=FedRIR: there is no such method (did you mean 'fedrir'?)",
    "run method=fed-rir": "(did you mean 'fedrir'?)",
    "run method=head_first.py": "must name a class of the file, as method=head_first.py:HeadFirst",
    "run method=head_first": "must name a class of the file, as method=head_first.py:HeadFirst",
    "run head_first.py": "did you mean method=head_first.py:HeadFirst?",
    "run model=head_first.py": "must name a class of the file, as model=head_first.py:HeadFirst",
    "run method=NotHere.py": "must name a class of the file, as method=NotHere.py:Mine",
    "run mlp": "did you mean model=mlp?",
    "run full": "did you mean data=mine data.path=full?",
    "run model=cnn": "(did you mean 'fedavg_cnn', 'fedmr_cnn', 'fedrir_cnn', 'har_cnn' or 'text_cnn'?)",
    "run model=ResNet18": "(did you mean 'resnet18'?)",
    "run data=my.csv": "for your own files, write data=mine data.path=my.csv",
    "run data=full": "for your own files, write data=mine data.path=full",
    "run data=./full": "for your own files, write data=mine data.path=./full",
    "run partition=noniid": "there is no such value; write partition=dirichlet",
    "run partition=dirichlet(0.5)": "write partition=dirichlet partition.alpha=0.5",
    "run engine=gpu": "there is no such value; write engine.device=cuda",
    "run participation=50%": "participation=50%: must be a number, or a range like 0.1-1.0; write 0.5",
    "run participation=5": "cohort=N sets the number of clients",
    "run method.lr=0,1": "method.lr=0,1: must be a number; write 0.1",
    "run out=my.csv": "out=my.csv: is a file; choose another folder",
    "run --resume my.csv": "my.csv is not a run folder, because it is a file",
    "run --resume nowhere": "nowhere is not a run folder, because it does not exist",
    "run --resume done/config.toml": "because it is a file; give its folder, done",
    "run --resume several": "it has no config.toml; give one of the run folders in it",
    "report done/config.toml": "run folder 'done/config.toml' is a file; give its folder, done",
    "compare fedavg fedrir": "did you mean method=fedavg,fedrir?",
    "compare method=fedavg fedrir": "did you mean method=fedavg,fedrir?",
    "compare method=fedavg, fedrir": "write method=fedavg,fedrir, without spaces",
    "compare methods=fedavg,fedrir": "unknown key 'methods' (did you mean 'method'?)",
    "compare method=fedavg,FedRIR": "(did you mean 'fedrir'?)",
    "compare method=fedavg,fedprox mu=0.1": "(did you mean 'method.mu'?)",
    "compare method=fedavg,fedrir seeds=0,1": "(did you mean 'seed'?)",
    "list fedrir": "'fedrir' cannot be listed; write fedloom list methods fedrir",
    "list FedRIR": "write fedloom list methods fedrir",
    "list digits": "write fedloom list datasets digits",
    "list methods FedRIR": "(did you mean 'fedrir'?)",
    "fedavg": "'fedavg' is not a command; write fedloom run method=fedavg",
    "rounds=5": "write fedloom run rounds=5",
    "old.toml": "write fedloom run old.toml",
    "train rounds=5": "'train' is not a command; write fedloom run rounds=5",
    "methods": "write fedloom list methods",
    "-V": "write fedloom --version",
}  # fmt: skip
LONG = (
    "run rounds={}", "run method={}", "run model={}", "run engine={}", "run uplink={}", "run data={}", "run data.path={}", "run out={}",
    "run {}=1", "run method.{}=1", "run --{}", "run {}", "report {}", "list {}", "check {}", "verify {}", "partition partition={}", "{}",
)  # fmt: skip


@pytest.fixture
def place(cli):
    Path("head_first.py").write_text(OWN)
    Path("old.toml").write_text("lr = 0.1\n")
    Path("my.csv").write_text("x,label\n1,2\n")
    for folder in ("full", "done", "several/run"):
        Path(folder).mkdir(parents=True)
    for folder in ("done", "several/run"):
        Path(folder, "config.toml").touch()
    return cli


@pytest.mark.parametrize(("line", "hint"), HINTS.items(), ids=HINTS)
def test_one_line_says_what_to_write(place, line, hint):
    done = place(*line.split())
    assert hint in done.err
    assert done.err.startswith("fedloom: error: ")
    assert done.err.count("\n") == 1
    assert done.code == 2
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["moon", "FedDyn", "per-fedavg", "pFedMe", "fednova"])
@pytest.mark.parametrize("command", ["run method=", "compare method=fedavg,", "check ", "list methods "])
def test_methods_of_other_papers_are_not_taken_for_misspelt_names(place, name, command):
    from fedloom.errors import normal
    from fedloom.methods.registry import METHODS

    if normal(name) in map(normal, METHODS):
        pytest.skip("the method is registered by now")
    done = place(*f"{command}{name}".split())
    assert f"method={name}: not available; available: " in done.err
    assert "did you mean" not in done.err
    assert done.code == 2


@pytest.mark.parametrize("line", LONG)
@pytest.mark.parametrize("text", ["x" * 10_000, "x " * 5000], ids=["word", "words"])
def test_a_long_value_does_not_fill_the_screen(place, line, text):
    command, _, rest = line.partition(" ")
    words = [command.format(text), *([rest.format(text)] if rest else [])]
    done = place(*words)
    assert done.code == 2
    assert len(done.err) < 1700
    assert done.err.count("\n") == 1
