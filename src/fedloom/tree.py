"""Trees of tensors: nested dictionaries with string keys and tensors as leaves.

A client's state, messages and the server's state are all such trees. These functions never change their inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Tree = dict[str, Any]  # values: Tensor | Tree
Weights = dict[str, dict[str, Tensor]]  # {"params": {name: tensor}, "buffers": {name: tensor}}


def map_tree(fn: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """Apply `fn` leaf by leaf to one or more trees of the same structure."""
    return {
        key: map_tree(fn, value, *(other[key] for other in others))
        if isinstance(value, dict)
        else fn(value, *(other[key] for other in others))
        for key, value in tree.items()
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield `(path, leaf)` in the order of the dictionaries; a path is the keys joined with `/`."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, path + "/")
        else:
            yield path, value


def unflatten(leaves: Mapping[str, Tensor]) -> Tree:
    """Return the tree with these leaves: the inverse of `flatten`. Branches without leaves are lost."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *branches, last = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = leaf
    return tree


def leaves(tree: Mapping[str, Any]) -> list[Tensor]:
    """Return all leaves, in the order of `flatten`."""
    return [leaf for _, leaf in flatten(tree)]


def merge(tree: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Return a tree with the leaves of both. The leaves of `over` replace those of `tree`. Tensors are shared, not copied."""
    merged = dict(tree)
    for key, value in over.items():
        mine = merged.get(key)
        merged[key] = merge(mine, value) if isinstance(value, dict) and isinstance(mine, dict) else value
    return merged


def clone(tree: Tree) -> Tree:
    """Return a copy that shares no memory with `tree`."""
    return map_tree(lambda leaf: leaf.detach().clone(), tree)


def versions(tree: Mapping[str, Any]) -> list[int]:
    """Return one counter per leaf, which increases with every in-place write to the leaf; see `changed_since`."""
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def changed_since(before: Sequence[int], tree: Mapping[str, Any]) -> str:
    """Return the path of the first leaf that was written to since `versions(tree)` returned `before`, or "".

    Writes through NumPy, and writes to tensors created in inference mode, are not detected.
    """
    if versions(tree) == before:
        return ""
    paths = [path for path, leaf in flatten(tree) if isinstance(leaf, Tensor)]
    return next(path for path, then, now in zip(paths, before, versions(tree), strict=True) if then != now)


def copy_shared(tree: Tree, others: Sequence[Tree]) -> Tree:
    """Return the tree with copies of those leaves that share memory with `others`, so that `others` can be released first."""
    taken = {leaf.untyped_storage().data_ptr() for other in others for leaf in leaves(other)}
    return map_tree(lambda leaf: leaf.clone() if leaf.untyped_storage().data_ptr() in taken else leaf, tree)


def zeros_like(tree: Tree) -> Tree:
    """Return zeros with the same structure, shapes and dtypes."""
    return map_tree(torch.zeros_like, tree)


def add(a: Tree, b: Tree, scale: float = 1.0) -> Tree:
    """Return `a + scale * b`. Integer leaves (counters) are rounded and keep their type."""

    def added(x: Tensor, y: Tensor) -> Tensor:
        total = x + scale * y
        return total if x.is_floating_point() else total.round().to(x.dtype)

    return map_tree(added, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """Return `a - b`."""
    return map_tree(torch.sub, a, b)


def dot(a: Tree, b: Tree) -> Tensor:
    """Return the inner product over all leaves, a 0-d tensor."""
    return torch.stack([leaf.sum() for leaf in leaves(map_tree(torch.mul, a, b))]).sum()


def cosines(trees: Sequence[Tree]) -> Tensor:
    """Return the cosines (n, n) of all pairs of trees, as float64.

    Each tree is treated as one vector. The cosine with a zero vector is 0.
    """
    gram = torch.zeros(len(trees), len(trees), dtype=torch.float64)
    for same in zip(*(leaves(tree) for tree in trees), strict=True):
        rows = torch.stack(same).reshape(len(trees), -1).double()
        gram += (rows @ rows.T).cpu()
    norms = gram.diagonal().sqrt()
    return gram / torch.outer(norms, norms).clamp(min=torch.finfo(torch.float64).tiny)


def mean_cosine(trees: Sequence[Tree]) -> float:
    """Return the mean of `cosines` over all pairs of two or more trees. It is between -1 and 1."""
    return float(cosines(trees).triu(1).sum() / (len(trees) * (len(trees) - 1) / 2))


def mean(trees: Sequence[Tree], shares: Sequence[float] | None = None) -> Tree:
    """Return the weighted mean. It is summed in the given order, so it does not depend on which client finished first.

    Integer leaves (counters) are averaged in float64 and rounded.

    Args:
        trees: one or more trees of the same structure.
        shares: one weight per tree; the weights should sum to 1. Default: equal weights.
    """
    if not trees:
        raise ValueError("the mean needs at least one tree")
    weights = [1.0 / len(trees)] * len(trees) if shares is None else [float(share) for share in shares]
    if len(weights) != len(trees):
        raise ValueError(f"{len(trees)} trees but {len(weights)} shares; each tree needs one share")

    def average(*values: Tensor) -> Tensor:
        exact = [value if value.is_floating_point() else value.double() for value in values]
        total = exact[0] * weights[0]
        for value, weight in zip(exact[1:], weights[1:], strict=True):
            total.add_(value, alpha=weight)
        return total if values[0].is_floating_point() else total.round().to(values[0].dtype)

    return map_tree(average, *trees)


def stack(trees: Sequence[Tree]) -> Tree:
    """Combine trees with the same structure into one tree, whose leaves have an additional first dimension."""
    return map_tree(lambda *values: torch.stack(values), *trees)


def unstack(tree: Tree) -> list[Tree]:
    """Return the trees that were stacked: the inverse of `stack`. The leaves are views."""
    n = len(leaves(tree)[0])
    return [map_tree(lambda leaf, i=i: leaf[i], tree) for i in range(n)]


def not_tensor(tree: Mapping[str, Any]) -> str:
    """Return a description of the first leaf that is not a tensor, such as `'seen' is a list`, or ""."""
    leaf: Any
    for path, leaf in flatten(tree):
        if not isinstance(leaf, Tensor):
            return f"'{path}' is {'an' if type(leaf).__name__[0] in 'aeiou' else 'a'} {type(leaf).__name__}"
    return ""


def structure(tree: Tree) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of every leaf by path. Two trees are compatible if their structures are equal."""
    return {path: (tuple(leaf.shape), leaf.dtype) for path, leaf in flatten(tree)}


def mismatch(expected: Tree, found: Tree) -> str:
    """Describe the first leaf whose name, shape or type differs, such as `'h' is missing, but was (2,) float32`; return "" if none does."""

    def form(value: tuple[tuple[int, ...], torch.dtype] | None) -> str:
        return "missing" if value is None else f"{value[0]} {str(value[1]).removeprefix('torch.')}"

    before, after = structure(expected), structure(found)
    wrong = next((path for path in [*before, *after] if before.get(path) != after.get(path)), None)
    return "" if wrong is None else f"'{wrong}' is {form(after.get(wrong))}, but was {form(before.get(wrong))}"


def equal(a: Tree, b: Tree) -> bool:
    """Return whether two trees have the same structure and the same values (NaN equals NaN). The order of keys does not matter."""
    other = dict(flatten(b))
    return structure(a) == structure(b) and all(
        torch.allclose(x, other[path], rtol=0, atol=0, equal_nan=True) for path, x in flatten(a)
    )


def not_finite(tree: Tree) -> str:
    """Return the path of the first leaf with a non-finite value, or ""."""
    floats = [(path, leaf) for path, leaf in flatten(tree) if leaf.is_floating_point()]
    if not floats:
        return ""
    sums = [
        leaf.sum() for _, leaf in floats
    ]  # cheap, but the sum of a finite leaf may overflow, so leaves are checked again below
    device = sums[0].device
    if device.type != "cpu":  # synchronise with the device only once
        sums = [torch.stack([total.to(device, torch.float32) for total in sums]).sum()]
    if all(math.isfinite(total.item()) for total in sums):
        return ""
    return next((path for path, leaf in floats if not torch.isfinite(leaf).all()), "")


def n_bytes(tree: Mapping[str, Any]) -> int:
    """Return the total size of all leaves in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree))
