"""Create the small files for docs/your-data.md: a table, images, sensor windows and texts.

usage: python examples/make_files.py [FOLDER]
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "my-data")
folder.mkdir(exist_ok=True)
rng = np.random.default_rng(0)

# A table: 600 patients of three clinics, some without a BMI. The length of a stay also depends on the clinic.
clinics = {"north": 0, "south": 2, "west": 4}
table = pd.DataFrame({"client": rng.choice(list(clinics), 600), "age": rng.integers(20, 80, 600)})
table["bmi"], table["smoker"] = rng.normal(26, 4, 600).round(1), rng.choice(["yes", "no"], 600)
stay = table.age / 20 + table.bmi / 8 + 2 * (table.smoker == "yes") + table.client.map(clinics)
table["days"] = (stay + rng.normal(0, 0.5, 600)).round(1)
table["risk"] = np.where(table.days > table.days.median(), "high", "low")
table.loc[::25, "bmi"] = None
table.to_csv(folder / "patients.csv", index=False)
table[["age", "smoker", "bmi"]].head(3).to_csv(folder / "new-patients.csv", index=False)

# Images: 300 discs, rings and squares, in folders named by class.
for i in range(300):
    kind, picture = ("disc", "ring", "square")[i % 3], Image.fromarray(rng.integers(0, 60, (16, 16), np.uint8))
    x, y = rng.integers(1, 6, 2).tolist()
    draw, box = ImageDraw.Draw(picture), (x, y, x + 9, y + 9)
    if kind == "square":
        draw.rectangle(box, fill=200)
    else:
        draw.ellipse(box, fill=200 if kind == "disc" else None, outline=200, width=2)
    (folder / "shapes" / kind).mkdir(parents=True, exist_ok=True)
    picture.save(folder / "shapes" / kind / f"{i}.png")
picture.save(folder / "new-square.png")

# Sensor windows: 400 windows of 3 channels and 64 time steps, from five people.
person, activity = rng.integers(0, 5, 400), rng.integers(0, 3, 400)
time, start = np.linspace(0, 1, 64), rng.uniform(0, 7, (400, 3, 1))
waves = np.sin(25 * activity[:, None, None] * time + start) * (1 + person[:, None, None])
windows = (waves + rng.normal(0, 0.3, (400, 3, 64))).astype(np.float32)
names = np.array([f"person-{i}" for i in person])
np.savez(folder / "windows.npz", x=windows, y=np.array(["rest", "walk", "run"])[activity], client=names)
np.save(folder / "new-windows.npy", windows[:2])

# Texts: 400 short reviews by four people, most of them with a word that states the opinion.
words = {"good": ["good", "great", "lovely", "superb"], "bad": ["bad", "poor", "boring", "weak"]}
opinion = rng.choice(["good", "bad"], 400)
things, said = rng.choice(["film", "book", "song", "play"], 400), [rng.choice([*words[o], "long"]) for o in opinion]
texts = [f"I thought the {thing} was {word}." for thing, word in zip(things, said, strict=True)]
writers = rng.choice(["ann", "bob", "eve", "tom"], 400)
pd.DataFrame({"client": writers, "text": texts, "opinion": opinion}).to_csv(folder / "reviews.csv", index=False)
pd.DataFrame({"text": ["I thought the song was lovely.", "A boring book!"]}).to_csv(
    folder / "new-reviews.csv", index=False
)
