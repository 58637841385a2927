"""Known data sets, from small files in the exact layouts in which they are published."""

import numpy as np
import pytest
import torch

from fedloom.data import SOURCES, Federation, TableOptions, default_scheme, load, partition
from fedloom.data.embedded import BREAST_CANCER
from fedloom.data.har import ACTIVITIES, SIGNALS
from fedloom.errors import DataError

ADULT = """39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, United-States, <=50K
50, ?, 83311, Bachelors, 13, Married-civ-spouse, ?, Husband, White, Male, 0, 0, 13, Cuba, >50K
38, Private, 215646, HS-grad, 9, Divorced, Sales, Not-in-family, Black, Female, 0, 0, 40, United-States, <=50K
53, Private, 234721, 11th, 7, Never-married, Sales, Husband, Black, Male, 0, 0, 40, Cuba, >50K
"""


@pytest.fixture
def adult(tmp_path):
    rows = ADULT.splitlines(keepends=True)
    (tmp_path / "adult.data").write_text("".join(rows * 4) + "\n")
    (tmp_path / "adult.test").write_text("|1x3 Cross validator\n" + "".join(rows[:2]).replace("50K\n", "50K.\n"))
    return tmp_path


def test_adult_joins_both_files_and_keeps_unknown_values_as_a_level(adult):
    pool = load("adult", adult)
    assert (pool.n_train, pool.n_rows, pool.classes) == (16, 18, ("<=50K", ">50K"))
    assert pool.labels.tolist() == [0, 1, 0, 1] * 4 + [0, 1]
    numbers, categories = pool.parts
    assert [c.name for c in numbers.columns] == [
        "age",
        "education-num",
        "capital-gain",
        "capital-loss",
        "hours-per-week",
    ]
    names = ["workclass", "marital-status", "occupation", "relationship", "race", "sex", "native-country"]
    assert [c.name for c in categories.columns] == names
    assert categories.columns[0].levels == ("", "Private", "State-gov")
    assert pool.inputs["categories"][1, 0] == 1
    assert pool.inputs["numbers"][0].tolist() == [39, 13, 2174, 0, 40]


def test_adult_takes_the_options_of_tables(adult):
    pool = load("adult", adult, table=TableOptions(missing="drop", by="race"))
    assert (pool.n_train, pool.n_rows, set(pool.columns["race"].tolist())) == (12, 13, {"White", "Black"})
    (adult / "adult.test").write_text("|1x3 Cross validator\n" + ADULT.splitlines()[0].replace("39, ", ""))
    with pytest.raises(DataError, match=r"adult\.test, line 2 has 14 fields instead of 15"):
        load("adult", adult)
    (adult / "adult.test").unlink()
    with pytest.raises(DataError, match=r"must contain the file adult\.test, but contains adult\.data"):
        load("adult", adult)


def heart(folder, sizes):
    """Write rows of the four files.

    Every third row has an unknown value in a column that is kept, and every second row in one that is not.
    """
    for place, n in enumerate(sizes):
        name = ("cleveland", "hungarian", "switzerland", "va")[place]
        rows = []
        for k in range(n):
            chol = "?" if k % 3 == 2 else f"{200 + k}.0"
            thal = "?" if k % 2 else "3.0"
            rows.append(
                f"{60 + k}.0,1.0,{k % 4 + 1}.0,{130 + place}.0,{chol},0.0,{k % 3}.0,{150 + k}.0,0.0,2.{k % 10},1.0,?,{thal},{k % 2 * 2}\n"
            )
        (folder / f"processed.{name}.data").write_text("".join(rows))


def test_heart_disease_has_the_rows_and_features_of_flamby(tmp_path, caplog):
    heart(tmp_path, (30, 30, 12, 12))
    pool = load("heart-disease", tmp_path)
    names = [column.name for column in pool.parts[0].columns]
    kept = ["age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak"]
    assert names == [*kept, "cp_2", "cp_3", "cp_4", "restecg_1", "restecg_2"]
    assert (pool.input_shape, pool.n_rows, pool.n_train, pool.classes) == ((13,), 56, 56, ("absent", "present"))
    assert pool.images[1].tolist() == [61, 1, 130, 201, 0, 151, 0, np.float32(2.1), 1, 0, 0, 1, 0]
    assert pool.labels[:4].tolist() == [0, 1, 1, 0]  # rows 0, 1, 3, 4
    assert "28 rows with unknown values are left out" in caplog.text
    assert default_scheme(pool) == "natural"
    made = partition(pool, scheme="natural", min_examples=2)
    assert made.owners == ("cleveland", "hungarian", "switzerland", "va")
    assert [len(made.train[i]) + len(made.test[i]) for i in range(4)] == [20, 20, 8, 8]
    data = Federation(pool, made)
    assert data.normalise == "own"
    for i in range(4):
        torch.testing.assert_close(data.train(i)[0][:, 0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_heart_disease_leaves_out_rows_by_the_columns_that_are_kept(tmp_path, caplog):
    """FLamby drops slope, ca and thal first, and then the rows with an unknown value, so `?` in these three columns drops no row."""
    known = ["63.0", "1.0", "4.0", "145.0", "233.0", "1.0", "2.0", "150.0", "0.0", "2.3", "3.0", "0.0", "6.0", "1"]
    rows = [known, *([*known[:i], "?", *known[i + 1 :]] for i in range(14))]
    other = ["-9", *known[1:-1], "0"]  # -9 stands for an unknown value only in UCI's unprocessed files
    content = "".join(",".join(row) + "\n" for row in [*rows, other])
    for hospital in ("cleveland", "hungarian", "switzerland", "va"):
        (tmp_path / f"processed.{hospital}.data").write_text(content)
    pool = load("heart-disease", tmp_path)
    assert "44 rows with unknown values are left out, as in FLamby" in caplog.text  # age to oldpeak, and num: 11 of 14
    assert pool.n_rows == 4 * 5
    assert pool.labels[:5].tolist() == [1, 1, 1, 1, 0]
    assert pool.images[0].tolist() == [63, 1, 145, 233, 1, 150, 0, np.float32(2.3), 0, 0, 1, 0, 1]
    assert pool.columns["hospital"].tolist() == [
        h for h in ("cleveland", "hungarian", "switzerland", "va") for _ in range(5)
    ]


def test_malformed_heart_files_are_refused(tmp_path):
    heart(tmp_path, (6, 6, 6, 6))
    file = tmp_path / "processed.va.data"
    file.write_text(file.read_text().replace("60.0,1.0,1.0", "60.0,1.0,7.0"))
    with pytest.raises(DataError, match=r"processed\.va\.data, line 1, column 'cp' must be one of 1, 2, 3, 4"):
        load("heart-disease", tmp_path)
    file.write_text(file.read_text().replace("60.0,1.0,7.0", "60.0,1.0,x"))
    with pytest.raises(DataError, match="column 'cp': 'x' is not a number"):
        load("heart-disease", tmp_path)
    file.write_text("1,2\n")
    with pytest.raises(DataError, match="line 1 has 2 fields instead of 14"):
        load("heart-disease", tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"must contain the file processed\.va\.data"):
        load("heart-disease", tmp_path)


@pytest.fixture
def har(tmp_path):
    """Write two subjects in train/ and one in test/, with eight windows of WALKING and four of LAYING each.

    The value of a window is its number.
    """
    number = 0
    for split, subjects in (("train", (1, 3)), ("test", (2,))):
        place = tmp_path / "UCI HAR Dataset" / split
        (place / "Inertial Signals").mkdir(parents=True)
        rows = [(subject, label) for subject in subjects for label in [1] * 8 + [6] * 4]
        values = np.arange(number, number + len(rows))
        number += len(rows)
        for k, signal in enumerate(SIGNALS):
            lines = ["  ".join(f"{v + k / 10 + t / 1000: .7e}" for t in range(128)) for v in values]
            (place / "Inertial Signals" / f"{signal}_{split}.txt").write_text("\n".join(lines) + "\n")
        (place / f"X_{split}.txt").write_text("\n".join(" ".join([f"{v / 100:.4f}"] * 561) for v in values) + "\n")
        (place / f"y_{split}.txt").write_text("".join(f"{label}\n" for _, label in rows))
        (place / f"subject_{split}.txt").write_text("".join(f"{subject}\n" for subject, _ in rows))
    return tmp_path


def test_har_has_channels_first_and_is_split_in_time(har):
    pool = load("har", har)
    assert (pool.input_shape, pool.classes) == ((9, 128), ACTIVITIES)
    # of 8 windows, the first 5 are for training, one is dropped, and 2 are for testing; of 4 windows, 2, 1 and 1
    assert pool.images[: pool.n_train, 0, 0].round().tolist()[:7] == [0, 1, 2, 3, 4, 8, 9]
    assert pool.images[pool.n_train :, 0, 0].round().tolist() == [6, 7, 11, 18, 19, 23, 30, 31, 35]
    torch.testing.assert_close(pool.images[1, :, 5], torch.tensor([1.005 + k / 10 for k in range(9)]))
    assert default_scheme(pool) == "own"
    made = partition(pool, scheme="own")
    assert (made.owners, [len(rows) for rows in made.train], [len(rows) for rows in made.test]) == (
        ("01", "02", "03"),
        [7] * 3,
        [3] * 3,
    )
    with pytest.raises(
        DataError, match="consecutive windows of a person overlap by half, so a random split would leak"
    ):
        partition(pool, scheme="natural")
    assert load("har", har, features=True).input_shape == (561,)
    assert load("har", har / "UCI HAR Dataset", rows=4).n_train == 4


def test_malformed_har_files_are_refused(har):
    place = har / "UCI HAR Dataset" / "train"
    labels = place / "y_train.txt"
    labels.write_text(labels.read_text().replace("6", "7"))
    with pytest.raises(DataError, match=r"y_train\.txt: labels must be from 1 to 6"):
        load("har", har)
    labels.write_text("1\n")
    with pytest.raises(DataError, match="has 24 windows, 1 labels and 24 subjects"):
        load("har", har)
    signal = place / "Inertial Signals" / "body_acc_x_train.txt"
    signal.write_text("1 2 3\n")
    with pytest.raises(DataError, match=r"body_acc_x_train\.txt must have 128 numbers in every line"):
        load("har", har)
    signal.write_text("a b\n")
    with pytest.raises(DataError, match=r"body_acc_x_train\.txt must have 128 numbers"):
        load("har", har)
    signal.unlink()
    with pytest.raises(DataError, match=r"body_acc_x_train\.txt: file does not exist"):
        load("har", har)
    with pytest.raises(DataError, match=r"data\.features=true: applies only to data=har"):
        load("digits", features=True)


def test_shakespeare_of_the_hub_is_one_table_with_the_split_of_leaf(tmp_path):
    text = ('He said, "ab cd" & went; ' * 60)[:1000]
    rows = [("LEAR_FOOL", text[k : k + 80], text[k + 80]) for k in range(820)] + [("HAMLET_QUEEN", text[:80], text[80])]
    quoted = ['{},"{}","{}"'.format(*(value.replace('"', '""') for value in row)) for row in rows]
    (tmp_path / "shakespeare.csv").write_text("\n".join(["character_id,x,y", *quoted]) + "\n")
    pool = load("shakespeare", tmp_path)
    assert (pool.n_train, pool.n_rows, pool.n_classes, set(pool.columns["client"])) == (738, 741, 80, {"LEAR_FOOL"})
    assert "".join(pool.classes[i] for i in pool.images[738]) == rows[738 + 79][1]
    assert pool.classes[pool.labels[0]] == text[80]
    assert default_scheme(pool) == "own"
    (tmp_path / "shakespeare.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"shakespeare\.csv must have the columns character_id, x, y"):
        load("shakespeare", tmp_path)


def test_breast_cancer_is_that_of_scikit_learn():
    theirs = pytest.importorskip("sklearn.datasets").load_breast_cancer()
    ours = load("breast-cancer")
    assert np.array_equal(ours.images.numpy(), theirs.data.astype(np.float32))
    assert ours.labels.tolist() == theirs.target.tolist()
    assert (ours.classes, ours.normalise) == (tuple(theirs.target_names.tolist()), "standard")


def test_embedded_files_name_their_source_and_licence():
    assert "CC BY 4.0" in BREAST_CANCER.with_suffix(".txt").read_text(encoding="utf-8")
    assert load("breast-cancer", rows=5).n_rows == 5


@pytest.mark.parametrize("name", ["adult", "heart-disease", "har", "emnist"])
def test_sets_that_are_not_shipped_say_where_to_get_the_files(name):
    with pytest.raises(
        DataError, match=r"no known hub repository; put .* into .* or give a folder with data\.path=FOLDER"
    ):
        load(name)


def test_every_source_has_a_reader_that_exists_and_files_that_are_named():
    from fedloom import lazy

    for source in SOURCES.values():
        assert not source.reader or callable(lazy.resolve(source.reader))
        assert source.hub or source.get or source.embedded or source.image_size is None
        assert source.image_size != 0 or source.inputs
    with pytest.raises(DataError, match="folder does not exist"):
        load("har", "/nowhere")
