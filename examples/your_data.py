"""Your own data in Python: train on files and predict new examples. Each cell (# %%) can be run in a notebook (docs/your-data.md).

Every cell compares a federated method with `centralised`, one model that is trained on all examples, and prints the scores of both:
fractions of correct predictions, or errors in days.

usage: python examples/make_files.py && python examples/your_data.py [OUT]
"""

# %% A table with missing values. The column `client` names the owner of each row.
import sys
from pathlib import Path

import pandas

import fedloom

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/your-data")
both = ["fedper", "centralised"]
patients = fedloom.load_data("my-data/patients.csv", label="risk", drop="days", missing="fill")
found = fedloom.compare(
    both, data=patients, model="table_mlp", rounds=5, progress=False, out=out / "risk", **{"method.lr": 0.1}
)
print(found.table[["personal final"]])  # chance is 0.5
run = found.runs["fedper-seed0"]
print(run.predict("west", {"age": 61, "bmi": 31.5, "smoker": "yes"}))
print(run.predict_proba("west", "my-data/new-patients.csv"))
table = pandas.read_csv("my-data/patients.csv")
print(run.score("west", table[table.client == "west"]))

# %% Later, in another process: open the run without its data.
again = fedloom.open(run.folder)
print(again.predict("west", "my-data/new-patients.csv"))

# %% A number instead of a class. Predictions are in days.
stays = fedloom.load_data("my-data/patients.csv", label="days", task="regression", drop="risk", missing="fill")
found = fedloom.compare(
    both, data=stays, model="table_mlp", rounds=5, progress=False, out=out / "days", **{"method.lr": 0.05}
)
print(found.table[["personal final"]])  # the error is 2.28 if the mean of all patients is predicted
print(found.runs["fedper-seed0"].predict("west", "my-data/new-patients.csv"))

# %% Images in folders named by class.
shapes = fedloom.load_data("my-data/shapes")
found = fedloom.compare(
    ["fedavg", "centralised"],
    data=shapes,
    model="fedmr_cnn",
    clients=4,
    partition={"alpha": 1},
    rounds=10,
    progress=False,
    out=out / "shapes",
    **{"method.lr": 0.1},
)
print(found.table[["personal final"]])  # chance is 0.33
print(found.runs["fedavg-seed0"].predict("server", "my-data/new-square.png"))

# %% Sensor windows from an .npz file.
windows = fedloom.load_data("my-data/windows.npz")
found = fedloom.compare(
    both,
    data=windows,
    model="har_cnn",
    rounds=8,
    progress=False,
    out=out / "windows",
    **{"method.lr": 0.05, "model.linear": False},
)
print(found.table[["personal final"]])  # chance is 0.33
print(found.runs["fedper-seed0"].predict("person-0", "my-data/new-windows.npy"))

# %% Texts in a column of a table.
reviews = fedloom.load_data("my-data/reviews.csv", text="text", label="opinion")
found = fedloom.compare(
    both, data=reviews, model="text_mean", rounds=8, progress=False, out=out / "reviews", **{"method.lr": 2}
)
print(found.table[["personal final"]])  # chance is 0.5
print(found.runs["fedper-seed0"].predict("ann", ["I thought the song was lovely.", "A boring book!"]))
