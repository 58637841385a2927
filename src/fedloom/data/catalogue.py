"""The data sets that can be loaded by name, with their properties and their repositories on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final


@dataclass(frozen=True, kw_only=True)
class Source:
    """Facts about a data set that are available before its files are read.

    `hub` is the Hugging Face repository, and `hub_folder` is the folder in it that contains the parquet files. Without `hub`, no
    repository with the required split is known, and users must supply the files. `folder` is the local folder (default: the name).
    `image_size` is the original width and height in pixels. None means that sizes differ, or that images are not square, so that the user
    must choose one; 0 means that inputs are not images. `natural` is the column by which `partition=natural` divides the examples. `only`
    lists the classes to keep, in this order. `task` is the learning task. `embedded` data are part of the package. `inputs` describes
    inputs that are not images. `reader` is the import path of the function that reads the files, unless they are in parquet, IDX or LEAF's
    JSON format. `is_table` and `is_text` state whether it accepts the options for tables and for texts. `files` is the name of the file on
    the hub, or the first part of the names of IDX files. `get` describes which files to put into the folder. `terms` is the licence, or
    what is known about it.
    """

    title: str
    n_classes: int
    image_size: int | None
    channels: int
    hub: str | None = None
    hub_folder: str = "data"
    label: str = "label"
    classes: tuple[str, ...] | None = None
    natural: str | None = None
    only: tuple[str, ...] | None = None
    folder: str | None = None
    task: str = "classification"
    embedded: bool = False
    inputs: str = ""
    reader: str = ""
    is_table: bool = False
    is_text: bool = False
    files: str = ""
    get: str = ""
    terms: str = ""


_DIGITS = tuple("0123456789")
_UPPER, _LOWER = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), tuple("abcdefghijklmnopqrstuvwxyz")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_OFFICE = (
    "backpack", "bike", "calculator", "headphones", "keyboard", "laptop", "monitor", "mouse", "mug", "projector"
)  # fmt: skip
_DOMAINNET10 = (
    "bird", "feather", "headphones", "ice_cream", "teapot", "tiger", "whale", "windmill", "wine_glass", "zebra"
)  # fmt: skip

_GREY: dict[str, Any] = {"image_size": 28, "channels": 1}
_SMALL: dict[str, Any] = {"image_size": 32, "channels": 3}
_NO_IMAGES: dict[str, Any] = {"image_size": 0, "channels": 0}
_UCI = "CC BY 4.0 (UCI)"
_MIXED: dict[str, Any] = {"image_size": None, "channels": 3, "natural": "domain"}

SOURCES: Final[Mapping[str, Source]] = MappingProxyType(
    {
        "digits": Source(
            title="scikit-learn's 1,797 handwritten digits (embedded)",
            n_classes=10, image_size=8, channels=1, classes=_DIGITS, embedded=True, terms=_UCI,
        ),
        "coloured-digits": Source(
            title="the same digits on coloured ground, each client with its own class colours (embedded)",
            n_classes=10, image_size=8, channels=3, classes=_DIGITS, natural="client", embedded=True, terms=_UCI,
        ),
        "diabetes": Source(
            title="442 diabetes patients, 10 variables, disease progression after a year (embedded; regression)",
            n_classes=0, **_NO_IMAGES, inputs="numbers (10)", task="regression", embedded=True,
            terms="none stated; distributed by scikit-learn (BSD)",
        ),
        "breast-cancer": Source(
            title="569 tumours, 30 features of cell nuclei (embedded)",
            n_classes=2, **_NO_IMAGES, inputs="numbers (30)", embedded=True, terms=_UCI,
        ),
        "adult": Source(
            title="Adult: income above 50,000 dollars, from the US census of 1994",
            n_classes=2, **_NO_IMAGES, inputs="table (12)", reader="fedloom.data.uci:read_adult", is_table=True, terms=_UCI,
            get="put adult.data and adult.test (archive.ics.uci.edu/dataset/2)",
        ),
        "heart-disease": Source(
            title="Heart disease in four hospitals, 740 patients (rows and features of FLamby)",
            n_classes=2, **_NO_IMAGES, inputs="numbers (13)", natural="hospital",
            reader="fedloom.data.uci:read_heart_disease", is_table=True,
            terms="CC BY 4.0 (UCI); name the investigators Janosi, Steinbrunn, Pfisterer and Detrano",
            get="put processed.{cleveland,hungarian,switzerland,va}.data (archive.ics.uci.edu/dataset/45)",
        ),
        "har": Source(
            title="Human activity with smartphones, 30 persons",
            n_classes=6, **_NO_IMAGES, inputs="signals (9, 128)", natural="subject", reader="fedloom.data.har:read_har",
            terms="CC BY 4.0 (UCI); the README in the archive prohibits commercial use",
            get="put the folder of 'UCI HAR Dataset.zip' (archive.ics.uci.edu/dataset/240)",
        ),
        "shakespeare": Source(
            title="Shakespeare (LEAF), by role: the next character after 80 characters",
            n_classes=80, **_NO_IMAGES, inputs="characters (80)", natural="client", hub="flwrlabs/shakespeare",
            files="shakespeare.csv", reader="fedloom.data.shakespeare:read_shakespeare", terms="BSD 2-clause (LEAF); text: public domain",
            get="put shakespeare.csv (hub: flwrlabs/shakespeare), or LEAF's train and test folders",
        ),
        "sent140": Source(
            title="Sentiment140 (LEAF), by user: the mood of a tweet", n_classes=2, **_NO_IMAGES, inputs="words",
            classes=("negative", "positive"), natural="client", is_text=True,
            terms="Twitter's terms: texts may not be passed on", get="put the data folder of LEAF's sent140 (train/*.json, test/*.json)",
        ),
        "celeba": Source(
            title="CelebA (LEAF), by celebrity: smiling or not", n_classes=2, image_size=None, channels=3,
            classes=("not smiling", "smiling"), natural="client", terms="research, not commercial",
            get="put the data folder of LEAF's celeba (train/*.json, test/*.json, raw/img_align_celeba)",
        ),
        "ag-news": Source(
            title="AG News: topic of a news item", n_classes=4, **_NO_IMAGES, inputs="words", hub="fancyzhx/ag_news",
            classes=("World", "Sports", "Business", "Sci/Tech"), reader="fedloom.data.ag_news:read_ag_news", is_text=True,
            terms="unknown; research, not commercial", get="put train-00000-of-00001.parquet and test-00000-of-00001.parquet (hub: "
            "fancyzhx/ag_news)",
        ),
        "mnist": Source(
            title="MNIST", n_classes=10, **_GREY, hub="ylecun/mnist", hub_folder="mnist", classes=_DIGITS
        ),
        "fashion-mnist": Source(
            title="Fashion-MNIST", n_classes=10, **_GREY,
            hub="zalando-datasets/fashion_mnist", hub_folder="fashion_mnist", classes=_FASHION,
        ),
        "emnist": Source(
            title="EMNIST, balanced split", n_classes=47, **_GREY, classes=_DIGITS + _UPPER + tuple("abdefghnqrt"),
            files="emnist-balanced-", terms="public domain (NIST)",
            get="put emnist-balanced-{train,test}-{images-idx3,labels-idx1}-ubyte.gz (nist.gov, EMNIST)",
        ),
        "femnist": Source(
            title="FEMNIST (LEAF), by writer", n_classes=62, **_GREY, hub="flwrlabs/femnist",
            label="character", classes=_DIGITS + _UPPER + _LOWER, natural="writer_id",
            terms="BSD 2-clause (LEAF); NIST: public domain",
        ),
        "cifar10": Source(
            title="CIFAR-10", n_classes=10, **_SMALL, hub="uoft-cs/cifar10", hub_folder="plain_text", classes=_CIFAR10
        ),
        "cifar100": Source(
            title="CIFAR-100, fine classes", n_classes=100, **_SMALL,
            hub="uoft-cs/cifar100", hub_folder="cifar100", label="fine_label",
        ),
        "cifar100-coarse": Source(
            title="CIFAR-100, coarse classes", n_classes=20, **_SMALL,
            hub="uoft-cs/cifar100", hub_folder="cifar100", label="coarse_label", folder="cifar100",
        ),
        "svhn": Source(
            title="SVHN, cropped digits", n_classes=10, **_SMALL,
            hub="ufldl-stanford/svhn", hub_folder="cropped_digits", classes=_DIGITS,
        ),
        "tiny-imagenet": Source(
            title="Tiny-ImageNet (test = its validation set)",
            n_classes=200, image_size=64, channels=3, hub="zh-plus/tiny-imagenet",
        ),
        "office-caltech10": Source(
            title="Office-Caltech10, four domains", n_classes=10, **_MIXED, classes=_OFFICE
        ),
        "domainnet": Source(title="DomainNet, six domains", n_classes=345, **_MIXED, hub="wltjr1007/DomainNet", terms="research only"),
        "domainnet10": Source(
            title="DomainNet, six domains, ten classes", n_classes=10, **_MIXED,
            hub="wltjr1007/DomainNet", terms="research only", only=_DOMAINNET10, folder="domainnet",
        ),
    }
)  # fmt: skip
