"""Nested dicts, lists and tuples of arrays, as libraries hold observations and memory states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tree = Any
"""An array of numpy or torch, or a dict, list or (named) tuple of trees. None is an empty tree."""


def leaves_of(tree: Tree) -> list[Any]:
    """Return the arrays of a tree, dicts in the order of their keys in the tree."""
    if tree is None:
        return []
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves_of(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves_of(value)]
    return [tree]


def map_leaves(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Return the tree with `function` applied to each array."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [map_leaves(function, value) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return function(tree)


def replace_leaves(tree: Tree, leaves: list[Any]) -> Tree:
    """Return the tree with other arrays, in the order of `leaves_of`."""
    rest: Iterator[Any] = iter(leaves)
    return map_leaves(lambda _: next(rest), tree)


def as_tensor(array: Any) -> Tensor:
    """Return a tensor with the numbers of an array; a tensor is returned as it is."""
    return array if isinstance(array, Tensor) else torch.as_tensor(np.asarray(array))
