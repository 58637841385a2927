"""The data sets that are known by name: what they are, and where the hub keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class Source:
    """What is known of a data set before its files are read.

    `hub` is the Hugging Face repository and `hub_folder` the folder in it that holds the parquet files; no `hub`
    means that none with the wanted split is known, so the files must be brought. `folder` is its local folder
    (default: the name). `image_size` is the native edge in pixels (None: sizes differ, so a size must be chosen).
    `natural` is the column that makes natural clients. `only` keeps some classes, in that order. `normalise` is the
    default of `Federation`.
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
    normalise: str = "half"


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

SOURCES: Final[Mapping[str, Source]] = MappingProxyType(
    {
        "digits": Source("scikit-learn's 1,797 handwritten digits (embedded)", 10, 8, 1, classes=_DIGITS),
        "mnist": Source("MNIST", 10, 28, 1, "ylecun/mnist", "mnist", classes=_DIGITS),
        "fashion-mnist": Source(
            "Fashion-MNIST", 10, 28, 1, "zalando-datasets/fashion_mnist", "fashion_mnist", classes=_FASHION
        ),
        "emnist": Source("EMNIST, balanced split", 47, 28, 1),
        "femnist": Source(
            "FEMNIST (LEAF), by writer", 62, 28, 1, "flwrlabs/femnist", label="character",
            classes=_DIGITS + _UPPER + _LOWER, natural="writer_id",
        ),
        "cifar10": Source("CIFAR-10", 10, 32, 3, "uoft-cs/cifar10", "plain_text", classes=_CIFAR10),
        "cifar100": Source("CIFAR-100, fine classes", 100, 32, 3, "uoft-cs/cifar100", "cifar100", "fine_label"),
        "cifar100-coarse": Source(
            "CIFAR-100, coarse classes", 20, 32, 3, "uoft-cs/cifar100", "cifar100", "coarse_label", folder="cifar100"
        ),
        "svhn": Source("SVHN, cropped digits", 10, 32, 3, "ufldl-stanford/svhn", "cropped_digits", classes=_DIGITS),
        "tiny-imagenet": Source("Tiny-ImageNet (test = its validation set)", 200, 64, 3, "zh-plus/tiny-imagenet"),
        "office-caltech10": Source(
            "Office-Caltech10, four domains", 10, None, 3, classes=_OFFICE, natural="domain"
        ),
        "domainnet": Source("DomainNet, six domains", 345, None, 3, "wltjr1007/DomainNet", natural="domain"),
        "domainnet10": Source(
            "DomainNet, six domains, ten classes", 10, None, 3, "wltjr1007/DomainNet", natural="domain",
            only=_DOMAINNET10, folder="domainnet",
        ),
    }
)  # fmt: skip
