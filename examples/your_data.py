"""Your own data in Python: train on files and predict new examples. Each cell (# %%) can be run in a notebook (docs/your-data.md).

usage: python examples/make_files.py && python examples/your_data.py [OUT]
"""

# %% A table with missing values. The column `client` names the owner of each row.
import sys
from pathlib import Path

import fedloom

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/your-data")
quick = {"progress": False, "rounds": 5}
patients = fedloom.load_data("my-data/patients.csv", label="risk", drop="days", missing="fill")
found = fedloom.compare(
    ["fedper", "centralised"], data=patients, model="table_mlp", out=out / "risk", **{"method.lr": 0.1}, **quick
)
print(found.table[["personal final"]])  # fractions of correct predictions; chance is 0.5
run = found.runs["fedper-seed0"]
print(run.predict("west", {"age": 61, "bmi": 31.5, "smoker": "yes"}))
print(run.predict_proba("west", "my-data/new-patients.csv"))
print(run.score("west", "my-data/patients.csv"))

# %% Later, in another process: open the run without its data.
again = fedloom.open(run.folder)
print(again.predict("west", "my-data/new-patients.csv"))

# %% A number instead of a class. Predictions are in days.
stays = fedloom.load_data("my-data/patients.csv", label="days", task="regression", drop="risk", missing="fill")
run = fedloom.run("fedper", data=stays, model="table_mlp", out=out / "days", **{"method.lr": 0.05}, **quick)
print(run.predict("west", "my-data/new-patients.csv"))

# %% Images in folders named by class.
shapes = fedloom.load_data("my-data/shapes")
run = fedloom.run(
    "fedavg",
    data=shapes,
    model="fedmr_cnn",
    clients=4,
    partition={"alpha": 1},
    rounds=10,
    progress=False,
    out=out / "shapes",
    **{"method.lr": 0.1},
)
print(run.predict("server", "my-data/new-square.png"))

# %% Sensor windows from an .npz file.
windows = fedloom.load_data("my-data/windows.npz")
run = fedloom.run(
    "fedper",
    data=windows,
    model="har_cnn",
    rounds=8,
    progress=False,
    out=out / "windows",
    **{"method.lr": 0.05, "model.linear": False},
)
print(run.predict("person-0", "my-data/new-windows.npy"))

# %% Texts in a column of a table.
reviews = fedloom.load_data("my-data/reviews.csv", text="text", label="opinion")
run = fedloom.run(
    "fedper", data=reviews, model="text_mean", rounds=8, progress=False, out=out / "reviews", **{"method.lr": 2}
)
print(run.predict("ann", ["I thought the song was lovely.", "A boring book!"]))
