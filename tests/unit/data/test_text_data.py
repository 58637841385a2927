"""Texts as token ids: tokens, vocabularies, tables, folders, and blocks of a language task."""

import numpy as np
import pandas as pd
import pytest
import torch

from fedloom.data import TableOptions, TextOptions, default_scheme, from_arrays, load, partition
from fedloom.data.preprocess import Preprocess
from fedloom.data.raw_inputs import stored_inputs
from fedloom.data.text import TextCoder, tokens_of
from fedloom.errors import DataError

CSV = """text,label,client,split
"Good, good film!",pos,a,train
"Bad film; BAD plot",neg,a,train
Good plot,pos,b,train
Bad acting,neg,b,train
"A word unseen: zebra, good",pos,b,test
"""


def test_words_are_letters_digits_or_one_other_character():
    assert tokens_of("Don't &amp; 3rd_ÏT ﬁne…", "words", "lower") == [
        "don't",
        "&",
        "3",
        "rd",
        "_",
        "ït",
        "fine",
        ".",
        ".",
        ".",
    ]
    assert tokens_of("İt", "words", "lower") == ["it"]  # without the dot that lower-casing separates
    assert tokens_of("A b", "chars", "keep") == ["A", " ", "b"]


def test_basic_english_follows_the_rules_of_torchtext():
    text = 'He said: "It\'s (really) good"; <br />Yes, no. What?!'
    expected = ["he", "said", "it", "'", "s", "(", "really", ")", "good", "yes", ",", "no", ".", "what", "?", "!"]
    assert tokens_of(text, "basic-english", "lower") == expected


@pytest.fixture
def reviews(tmp_path):
    file = tmp_path / "reviews.csv"
    file.write_text(CSV)
    return file


def read(file, task=None, table=None, **options):
    return load("reviews", file, task=task, table=table, texts=TextOptions(**{"text": ("text",), **options}))


@pytest.mark.parametrize("of", [list, np.array, pd.Series])
def test_lists_of_texts_are_token_ids(of):
    texts, tests = of(["good film", "bad film", "good plot"]), of(["good zebra"])
    pool = from_arrays(texts, [1, 0, 1], tests, [1], vocabulary=6)
    assert pool.parts[0].text.words == ("film", "good")
    assert pool.images.tolist() == [[5, 4], [1, 4], [5, 1], [5, 1]]
    assert stored_inputs(pool.preprocess(), "film, good").tolist() == [[4, 1]]  # cut at two words
    with pytest.raises(DataError, match="x has texts, but x_test has none"):
        from_arrays(texts, [1, 0, 1], np.ones((1, 2)), [1])


def test_a_column_of_text_is_token_ids_with_the_vocabulary_of_training_texts(reviews, caplog):
    pool = read(reviews)
    (part,) = pool.parts
    assert part.text.words == (
        "bad",
        "good",
        "film",
        "plot",
    )  # by frequency, then alphabet; those that occur once are unknown
    assert pool.images.tolist()[:4] == [[5, 1, 5, 6, 1], [4, 6, 1, 4, 7], [5, 7, 0, 0, 0], [4, 1, 0, 0, 0]]
    assert pool.images[4].tolist() == [1, 1, 1, 1, 1]  # "zebra" is not learned from test texts; cut after five tokens
    assert (pool.n_train, pool.classes, pool.spec.fields[0].levels) == (4, ("neg", "pos"), (8,))
    assert pool.columns["client"].tolist() == list("aabbb")
    assert (
        "built from the training texts of all clients, so it can reveal words that only one client wrote" in caplog.text
    )
    assert "5 texts as 5 words of 8 different, 2 classes, train 4, test 1" in caplog.text


def test_predictions_see_the_same_ids_as_training(reviews):
    pool = read(reviews, table=TableOptions(label="label"))
    preprocess = Preprocess.parse(pool.preprocess().text(), "file")
    assert preprocess == pool.preprocess()
    for raw in (
        reviews,
        str(reviews),
        {"text": ["Good, good film!"], "other": [1]},
        "Good, good film!",
        ["Good, good film!"],
    ):
        assert torch.equal(stored_inputs(preprocess, raw)[0], pool.images[0])
    assert torch.equal(stored_inputs(preprocess, reviews), pool.images)
    assert torch.equal(preprocess.prepared(pool.images), pool.images.long())
    text = reviews.with_name("one.txt")
    text.write_text("Good plot")
    assert torch.equal(stored_inputs(preprocess, text), pool.images[2:3])
    with pytest.raises(DataError, match="the column 'text' is missing"):
        stored_inputs(preprocess, {"body": ["x"]})
    with pytest.raises(DataError, match=r"'inputs\.0' is malformed|has another vocabulary or length"):
        Preprocess.parse(pool.preprocess().text().replace('"bad",', ""), "file")


def test_options_of_texts(reviews, tmp_path):
    assert read(reviews, tokens="bytes", length=4).images[0].tolist() == [4 + byte for byte in b"Good"]
    assert read(reviews, tokens="bytes", case="lower", length=4).images[0, 0] == 4 + ord("g")
    assert read(reviews, tokens="chars", length=9).parts[0].text.words[:4] == (" ", "!", ",", ";")
    assert read(reviews, vocabulary=6).parts[0].text.words == ("bad", "good")
    assert "acting" in read(reviews, min_count=1).parts[0].text.words
    words = tmp_path / "words.txt"
    words.write_text("film\nzebra\n")
    pool = read(reviews, vocabulary=words, length=7)
    assert pool.images[4].tolist() == [1, 1, 1, 1, 5, 1, 1]
    both = load("reviews", reviews, texts=TextOptions(text=("client", "text"), min_count=1))
    assert both.images[0, 1] == 3  # the token `end` between the columns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ("body",)}, "data.text=body: reviews.csv has no such column"),
        ({"tokens": "bytes", "vocabulary": 9}, "data.vocabulary=9: data.tokens=bytes has 256 tokens; remove it"),
        ({"min_count": 9}, "data.min_count=9: no token occurs that often"),
        ({"vocabulary": 4}, "data.vocabulary=4: must be above 4"),
        ({"text": (), "tokens": "words"}, "data.tokens=words: applies to texts; set data.text=COLUMN"),
    ],
)
def test_options_that_do_not_fit_are_refused(reviews, options, message):
    with pytest.raises(DataError, match=message):
        read(reviews, **options)


def test_files_of_words_are_checked(reviews, tmp_path):
    for content, message in (("", "has no words"), ("a\nb\na\n", "has 'a' twice"), ("\xff", "cannot be read as UTF-8")):
        (tmp_path / "words.txt").write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match=message):
            read(reviews, vocabulary=tmp_path / "words.txt")


def test_rows_without_text_are_refused_or_dropped(reviews):
    reviews.write_text(CSV.replace("Good plot", ""))
    with pytest.raises(
        DataError,
        match=r"reviews\.csv, line 4, column 'text': no text; in all, 1 rows have no text; set data\.missing=drop",
    ):
        read(reviews)
    assert read(reviews, table=TableOptions(missing="drop")).n_train == 3
    with pytest.raises(
        DataError, match=r"data\.columns=client: with data\.task=language, the texts are the only inputs"
    ):
        read(reviews, task="language", table=TableOptions(columns=("client",)))


def test_texts_may_have_numbers_as_targets(tmp_path):
    (tmp_path / "stars.csv").write_text("review,stars\nvery good,4.5\nvery bad,1\ngood,4\nbad,1.5\n")
    pool = load(
        "stars",
        tmp_path / "stars.csv",
        task="regression",
        table=TableOptions(label="stars"),
        texts=TextOptions(text=("review",)),
    )
    assert (pool.objective.task, pool.objective.mean, pool.input_shape) == ("regression", (2.75,), (2,))


def test_folders_of_text_files_are_classes(tmp_path, caplog):
    for split, label, number, text in (
        ("train", "pos", 1, "good film"), ("train", "neg", 1, "bad film"), ("train", "pos", 2, "good good"), ("test", "neg", 1, "bad"),
    ):  # fmt: skip
        file = tmp_path / split / label / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    pool = load("films", tmp_path)
    assert (pool.n_train, pool.classes, pool.labels.tolist()) == (3, ("neg", "pos"), [0, 1, 1, 0])
    assert pool.parts[0].text.words == ("good", "film")
    assert "4 texts as 2 words of 6 different, 2 classes, train 3, test 1" in caplog.text
    (tmp_path / "train" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"'notes\.txt' is not in a class folder"):
        load("films", tmp_path)


def test_texts_of_owners_become_blocks_that_are_split_in_time(tmp_path, caplog):
    for owner, text in (("ann", "abcdefgh" * 6), ("bob", "xyz" * 4)):
        (tmp_path / f"{owner}.txt").write_text(text)
    pool = load("letters", tmp_path, task="language", texts=TextOptions(length=3))
    assert (pool.objective.task, pool.objective.vocabulary, pool.input_shape) == ("language", 260, (3,))
    assert pool.images[0].tolist() == [4 + byte for byte in b"abc"]
    assert pool.targets[0].tolist() == [4 + byte for byte in b"bcd"]
    assert pool.images[1].tolist() == [4 + byte for byte in b"efg"]  # blocks do not overlap
    assert (pool.n_train, pool.columns["client"].tolist()) == (
        9 + 3 - 1,
        ["ann"] * 9 + ["bob"] * 2 + ["ann"] * 3 + ["bob"],
    )
    assert default_scheme(pool) == "own"
    made = partition(pool, scheme="own")
    assert [len(rows) for rows in made.test] == [3, 1]
    assert "of 2 clients" in caplog.text
    words = load("letters", tmp_path, task="language", texts=TextOptions(length=3, tokens="chars"))
    assert words.parts[0].text.words == tuple("abcdefghxyz")
    short = load("letters", tmp_path / "bob.txt", task="language", texts=TextOptions(length=7))
    assert (short.n_train, short.n_rows, short.columns) == (2, 2, {})
    assert short.images[1].tolist() == [4 + byte for byte in b"zxy"] + [0] * 4
    assert short.targets[1].tolist() == [4 + byte for byte in b"xyz"] + [-100] * 4


def test_words_of_test_blocks_are_not_learned(tmp_path):
    text = "one two " * 6 + "three three three four"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text)
    pool = load("a", tmp_path, task="language", texts=TextOptions(length=3, tokens="words", min_count=1))
    assert pool.parts[0].text.words == ("one", "two")
    assert pool.targets.max() < pool.objective.vocabulary == 6


def test_tables_of_texts_become_blocks(tmp_path):
    (tmp_path / "posts.csv").write_text("text,user\nabcd,u\nef,u\nghijkl,v\n")
    table, texts = TableOptions(owner="user"), TextOptions(text=("text",), length=2)
    pool = load("posts", tmp_path / "posts.csv", task="language", table=table, texts=texts)
    assert pool.images[2].tolist() == [4 + ord("d"), 3]  # the token `end` between the documents of a user
    assert pool.columns["client"].tolist() == ["u", "v", "u", "v"]


def test_bytes_need_no_vocabulary_and_ids_are_checked():
    coder = TextCoder(tokens="bytes", case="keep", length=4)
    assert coder.stored([("é",), ("",)]).tolist() == [[4 + 0xC3, 4 + 0xA9, 0, 0], [1, 0, 0, 0]]
    assert coder.stored([("x",)]).dtype == torch.int16  # 260 ids do not fit into a byte


def test_ag_news_has_named_classes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, n in (("train", 4), ("test", 2)):
        table = pa.table({"text": [f"news {k} of {split}" for k in range(4 * n)], "label": np.arange(4 * n) % 4})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    pool = load("ag-news", tmp_path, texts=TextOptions(length=6))
    assert (pool.n_train, pool.n_rows, pool.classes) == (16, 24, ("World", "Sports", "Business", "Sci/Tech"))
    assert pool.labels.tolist()[:5] == [0, 1, 2, 3, 0]
    assert pool.parts[0].text.words[:3] == ("news", "of", "train")
    with pytest.raises(DataError, match=r"data\.text=body: does not apply to data=ag-news"):
        load("ag-news", tmp_path, texts=TextOptions(text=("body",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has neither train\.parquet"):
        load("ag-news", tmp_path / "empty")
