"""LEAF's JSON files, IDX files, and PFLlib's texts."""

import gzip
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from fedloom.data import TextOptions, default_scheme, leaf, load, partition
from fedloom.data.layouts import find_leaf
from fedloom.data.windows import ALPHABET, split_windows
from fedloom.errors import DataError

TEXT = "To be, or not to be: that is the question: Whether 'tis nobler in the mind to suffer. " * 3


def windows(n, start=0):
    return [TEXT[start + k : start + k + 80] for k in range(n)], [TEXT[start + k + 80] for k in range(n)]


def write(file, users, more=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {name: {"x": x, "y": y} for name, (x, y) in users.items()}
    content = {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": data,
        **(more or {}),
    }
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def plays(tmp_path):
    name = "all_data_0_niid_1_keep_0_{}_9.json"
    write(tmp_path / "data" / "train" / name.format("train"), {"HAMLET_QUEEN": windows(5), "LEAR_FOOL": windows(3, 9)})
    write(
        tmp_path / "data" / "test" / name.format("test"), {"HAMLET_QUEEN": windows(2, 84), "LEAR_FOOL": windows(1, 90)}
    )
    return tmp_path


def test_shakespeare_is_windows_of_characters_with_the_split_of_leaf(plays, caplog):
    pool = load("plays", plays)
    assert (pool.n_train, pool.n_rows, pool.n_classes, pool.input_shape) == (8, 11, 80, (80,))
    assert "".join(ALPHABET[i] for i in pool.images[0]) == TEXT[:80]
    assert [ALPHABET[i] for i in pool.labels[:5]] == list(TEXT[80:85])
    assert (pool.images.dtype, pool.spec.fields[0].kind, pool.spec.fields[0].levels) == (torch.uint8, "token", (80,))
    assert "LEAF's files, 11 windows of 80 characters of 2 users, train 8, test 3" in caplog.text
    assert default_scheme(pool) == "own"
    made = partition(pool, scheme="own")
    assert made.owners == ("HAMLET_QUEEN", "LEAR_FOOL")
    assert [rows.tolist() for rows in made.train] == [[0, 1, 2, 3, 4], [5, 6, 7]]
    assert [rows.tolist() for rows in made.test] == [[8, 9], [10]]


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "natural", "min_examples": 2},
        {"scheme": "iid", "clients": 2, "min_examples": 2, "merge": False, "test_fraction": 0.3},
        {"scheme": "own", "valid": 0.3},
    ],
)
def test_windows_are_never_split_at_random(plays, settings):
    with pytest.raises(DataError, match="overlap in all but one character, so a random split would leak test examples"):
        partition(load("plays", plays), **settings)


def test_the_own_split_may_be_that_of_the_largest_clients(plays):
    made = partition(load("plays", plays), 1, scheme="own")
    assert (made.owners, made.common.tolist()) == (("HAMLET_QUEEN",), [8, 9])
    with pytest.raises(DataError, match="its own split for 2 clients"):
        partition(load("plays", plays), 3, scheme="own")


def test_the_rule_by_which_leaf_splits_windows():
    assert [len(split_windows(n)[1]) for n in (1, 2, 79, 80, 800)] == [0, 0, 0, 0, 1]
    first, then = split_windows(900)
    assert (first, then.tolist()) == (slice(0, 810), list(range(889, 900)))


def test_files_before_the_split_are_split_in_time(tmp_path, caplog):
    long = ("ab cd ef gh " * 90)[: 80 + 820]
    x, y = [long[k : k + 80] for k in range(820)], [long[k + 80] for k in range(820)]
    write(tmp_path / "all_data" / "all_data.json", {"A_B": (x, y), "C_D": windows(4)}, {"hierarchies": ["A", "C"]})
    pool = load("plays", tmp_path)
    assert (pool.n_train, pool.n_rows, set(pool.columns["client"])) == (738, 738 + 3, {"A_B"})
    assert "".join(ALPHABET[i] for i in pool.images[738]) == x[738 + 79]
    assert "1 users with too few windows for a test split are left out" in caplog.text


def test_femnist_is_pictures_by_writer(tmp_path):
    pixels = np.array([[0, 1, 7, 255] * 196, [255] * 784]) / 255
    for i in range(2):
        write(tmp_path / "train" / f"part_{i}.json", {f"f{i:04}_14": (pixels.tolist(), [61, i])})
    pool = load("letters", tmp_path)
    assert (pool.input_shape, pool.n_classes, pool.columns["client"].tolist()[::2]) == (
        (1, 28, 28),
        62,
        ["f0000_14", "f0001_14"],
    )
    assert pool.images[0, 0, 0, :4].tolist() == [0, 1, 7, 255]
    assert default_scheme(pool) == "natural"
    femnist = load("femnist", tmp_path)
    assert (femnist.classes[61], list(femnist.columns)) == ("z", ["writer_id"])


def tweets(*texts):
    """Return tweets in LEAF's form, in which the name of the file is a sixth field."""
    moment = "Sat May 16 23:58:44 UTC 2009"
    return [[str(i), moment, "NO_QUERY", "ann", text, "training"] for i, text in enumerate(texts)]


@pytest.fixture
def moods(tmp_path):
    train = {"ann": (tweets("so happy today", "so sad"), [1, 0]), "bob": (tweets("happy happy day"), [1])}
    write(tmp_path / "train" / "all_data_niid_1_keep_0_train_9.json", train)
    write(tmp_path / "test" / "all_data_niid_1_keep_0_test_9.json", {"ann": (tweets("a new sad day"), [0])})
    return tmp_path


def test_sent140_is_texts_by_user(moods, caplog):
    pool = load("sent140", moods, texts=TextOptions(min_count=1, length=3))
    assert (pool.n_train, pool.n_rows, pool.classes) == (3, 4, ("negative", "positive"))
    assert (pool.columns["client"].tolist(), pool.labels.tolist()) == (["ann", "ann", "bob", "ann"], [1, 0, 1, 0])
    words = pool.parts[0].text.words
    assert [[words[i - 4] for i in row if i > 3] for row in pool.images.tolist()] == [
        ["so", "happy", "today"],
        ["so", "sad"],
        ["happy", "happy", "day"],
        ["sad"],  # "a" and "new" do not occur in training
    ]
    assert "LEAF's files, 4 texts of 2 users, train 3, test 1" in caplog.text
    assert default_scheme(pool) == "natural"
    assert load("mine", moods, texts=TextOptions(tokens="chars")).classes == ("0", "1")
    with pytest.raises(DataError, match=r"data\.image_size=8: .* has no image files"):
        load("mine", moods, image_size=8)
    write(moods / "train" / "b.json", {"tom": (["just a text"], [1])})
    assert load("mine", moods).n_train == 4


def test_celeba_is_pictures_in_a_folder(tmp_path):
    """Labels are 0.0 and 1.0, and the images are in the folder that LEAF's scripts use."""
    folder = tmp_path / "data" / "raw" / "img_align_celeba"
    folder.mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((22, 18, 3), 50 * i, np.uint8)).save(folder / f"00000{i}.png")
    write(tmp_path / "data" / "train" / "a.json", {"2880": (["000003.png", "000001.png"], [1.0, 0.0])})
    write(tmp_path / "data" / "test" / "a.json", {"2880": (["000002.png"], [1.0])})
    pool = load("celeba", tmp_path, image_size=8)
    assert (pool.input_shape, pool.classes, pool.labels.tolist()) == ((3, 8, 8), ("not smiling", "smiling"), [1, 0, 1])
    assert (pool.images[:, 0, 0, 0].tolist(), set(pool.columns["client"])) == ([150, 50, 100], {"2880"})
    assert pool.parts[0].resize
    assert load("mine", tmp_path, rows=1).input_shape == (3, 22, 18)
    (folder / "000003.png").unlink()
    with pytest.raises(DataError, match=r"000003\.png cannot be read \(No such file"):
        load("celeba", tmp_path, image_size=8)
    with pytest.raises(DataError, match=r"data\.tokens=words: .* has no texts"):
        load("mine", tmp_path, texts=TextOptions(tokens="words"))


@pytest.mark.parametrize("kind", ["moods", "plays"])
def test_files_are_read_once_and_what_was_said_is_said_again(kind, request, caplog, monkeypatch):
    place = request.getfixturevalue(kind)
    first, said = load("mine", place), caplog.messages.copy()
    assert said
    caplog.clear()
    with monkeypatch.context() as patched:
        patched.setattr(leaf, "users_of", None)  # the files are not read again
        again = load("mine", place)
    assert caplog.messages == said
    assert torch.equal(first.images, again.images)
    assert (first.preprocess(), first.overlaps) == (again.preprocess(), again.overlaps)
    assert first.columns["client"].tolist() == again.columns["client"].tolist()
    for file in place.rglob("*.json"):
        file.write_text(file.read_text().replace("ann", "eve").replace("LEAR", "KENT"))
    assert set(load("mine", place).columns["client"]) & {"eve", "KENT_FOOL"}


def test_without_a_handler_what_is_said_still_reaches_the_terminal(moods, capsys, monkeypatch):
    for logger in (logging.getLogger(), logging.getLogger("fedloom")):
        monkeypatch.setattr(logger, "handlers", [])
    load("mine", moods)
    assert "LEAF's files, 4 texts" in capsys.readouterr().err


def test_other_numbers_are_vectors(tmp_path):
    write(tmp_path / "train" / "a.json", {"u": ([[0.5, 1.5], [2.5, 3.5]], [0, 1]), "v": ([[-1.0, 2.0]], [1])})
    pool = load("synthetic", tmp_path, rows=2)
    assert (pool.input_shape, pool.n_rows) == ((2,), 2)


@pytest.mark.parametrize(
    ("users", "more", "message"),
    [
        ({"u": ([[1.5] * 784], [0])}, {}, r"user 'u': pixels run from 1.5 to 1.5; LEAF's are from 0 to 1"),
        ({"u": (["a" * 80], ["€"])}, {}, r"has the character '€', which is not one of LEAF's 80"),
        ({"u": (["ab", "abc"], ["a", "b"])}, {}, "its windows of text differ in length"),
        (
            {"u": (["000001.jpg"], [0])},
            {},
            r"names images, such as 000001\.jpg; put them into .*raw/img_align_celeba",
        ),
        ({"u": (["../1.jpg"], [0])}, {}, r"'\.\./1\.jpg' is not the name of a file alone"),
        ({"u": ([["1", "now", "NO_QUERY", "u"]], [0])}, {}, "not those of Sent140: id, date, query, user, text"),
        (
            {"u": (["a text"], [0]), "v": ([[1.0]], [1])},
            {},
            "the examples of user 'v' are numbers, but those of others",
        ),
        ({"u": (["a text"], ["no", "yes"])}, {}, "has 1 inputs and 2 labels"),
        ({"u": ([[1.0]], [10**400])}, {}, "labels must be integers"),
        ({"u": ([[1.0, 2.0], [1.0]], [0, 1])}, {}, "its inputs are lists of different lengths, or of several types"),
        ({"u": ([[1.0, 2.0]], [0.5])}, {}, "labels must be integers"),
        ({"u": ([[1.0, 2.0]], [0, 1])}, {}, "has 1 inputs and 2 labels"),
        ({"u": ([[1.0, 2.0]], [0])}, {"num_samples": [2]}, "'users' and 'num_samples' do not match"),
        ({"u": ([[1.0, 2.0]], [0])}, {"users": None}, "must contain 'users', 'num_samples' and 'user_data'"),
        ({}, {}, "must contain 'users'"),
    ],
)
def test_malformed_files_are_refused(tmp_path, users, more, message):
    write(tmp_path / "train" / "a.json", users, more)
    with pytest.raises(DataError, match=message) as refused:
        load("mine", tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"users": ["u"]', '{"user_data": {"u" 1}}', '{"user_data": {"u": 1]}', "\xff"]
)
def test_damaged_files_are_refused(tmp_path, text):
    file = write(tmp_path / "train" / "a.json", {"u": ([[1.0]], [0])})
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.json cannot be read as LEAF's JSON|must contain lists"):
        load("mine", tmp_path)


def test_a_user_belongs_to_one_file_of_a_split(tmp_path):
    for name in "ab":
        write(tmp_path / "train" / f"{name}.json", {"u": ([[1.0]], [0])})
    with pytest.raises(DataError, match="user 'u' is also in another file of the same split"):
        load("mine", tmp_path)
    assert find_leaf(tmp_path / "nowhere") == {}


def idx(file, values, code=0x08):
    file.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, code, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    with gzip.open(file, "wb") if file.suffix == ".gz" else file.open("wb") as stream:
        stream.write(head + values.tobytes())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (4, 5, 6)).astype(np.uint8), rng.integers(0, 256, (2, 5, 6)).astype(np.uint8)
    for split, pictures, labels in (("train", train, [0, 2, 1, 0]), ("t10k", test, [1, 2])):
        idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", pictures)
        idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", np.array(labels, np.uint8))
    pool = load("mine", tmp_path)
    assert (pool.n_train, pool.n_rows, pool.classes) == (4, 6, ("0", "1", "2"))
    assert np.array_equal(pool.images[:, 0].numpy(), np.concatenate([train, test]))
    assert pool.labels.tolist() == [0, 2, 1, 0, 1, 2]
    assert load("mnist", tmp_path).classes == tuple("0123456789")


def test_pictures_of_emnist_are_turned(tmp_path, caplog):
    """An "L" looks like an "L": its stem is at the left and its foot at the bottom."""
    letter = np.zeros((28, 28), np.uint8)
    letter[4:24, 8:11] = letter[21:24, 8:20] = 255
    idx(tmp_path / "emnist-balanced-train-images-idx3-ubyte.gz", letter.T[None])
    idx(tmp_path / "emnist-balanced-train-labels-idx1-ubyte.gz", np.array([21], np.uint8))
    idx(tmp_path / "emnist-letters-train-images-idx3-ubyte.gz", letter.T[None])
    pool = load("emnist", tmp_path)
    assert np.array_equal(pool.images[0, 0].numpy(), letter)
    assert (pool.classes[pool.labels[0]], pool.n_classes, pool.classes[-1]) == ("L", 47, "t")
    assert "turned, as in EMNIST" in caplog.text
    with pytest.raises(DataError, match="several files of images for one split"):
        load("mine", tmp_path)


def test_malformed_idx_files_are_refused(tmp_path):
    pictures, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    idx(pictures, np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(DataError, match="the file of its labels, train-labels-idx1-ubyte, is missing"):
        load("mine", tmp_path)
    idx(labels, np.zeros(3, np.uint8))
    with pytest.raises(DataError, match="has 2 images, but train-labels-idx1-ubyte has 3 labels"):
        load("mine", tmp_path)
    for content, message in (
        (b"\x00\x00\x08\x03", "its header gives the shape"),
        (b"\x89PNG1234", "is not an IDX file"),
        (pictures.read_bytes()[:-1], "its header gives 18 bytes, but it has 17"),
        (pictures.read_bytes() + b"1", "but it has more"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "which cannot be read"),
    ):
        pictures.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load("mine", tmp_path)
    pictures.rename(tmp_path / "test-images-idx3-ubyte")
    with pytest.raises(DataError, match="but no training images"):
        load("mine", tmp_path)


def test_texts_of_pfllib_are_token_ids(tmp_path):
    def save(split, i, texts, labels):
        pairs = np.empty((len(texts), 2), object)
        for row, ids in enumerate(texts):
            pairs[row, 0], pairs[row, 1] = ids, len(ids)
        (tmp_path / split).mkdir(exist_ok=True)
        np.savez_compressed(tmp_path / split / f"{i}.npz", data={"x": pairs, "y": np.array(labels)})

    save("train", 0, [[2, 7, 0], [2, 300, 1]], [0, 3])
    save("test", 0, [[2, 5, 5]], [1])
    pool = load("pfllib", tmp_path)
    assert pool.images.tolist() == [[2, 7, 0], [2, 300, 1], [2, 5, 5]]
    assert (pool.spec.fields[0].kind, pool.spec.fields[0].levels, pool.labels.tolist()) == ("token", (301,), [0, 3, 1])
    for texts in ([[2, 5], [1]], [[2, -5], [1, 1]], [[0.5, 1], [1, 1]]):
        save("test", 0, texts, [0] * len(texts))
        with pytest.raises(DataError, match="texts must be pairs of a list of token ids and its length"):
            load("pfllib", tmp_path)
