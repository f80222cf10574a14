"""Keywords of another type than a signature says are refused where they are bound, of every function that a recipe may name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from jaxpost.config import type_hints
from jaxpost.config.resolve import ARGUMENTS, bind, find, known
from jaxpost.errors import UserError
from jaxpost.synthesis import endpoint


@pytest.mark.parametrize(
    "hint, good, wrong, words",
    [
        (int, [3, np.int64(3)], [3.0, True, "3", [3]], "a whole number"),
        (float, [3, 0.5, np.float32(2)], [True, "3", []], "a number"),
        (bool, [True], [1, "true"], "true or false"),
        (str, ["a"], [1, ["a"]], "a text"),
        (int | float, [1, 0.5], ["1"], "a whole number or a number"),
        (Sequence[int], [[1, 2], (), np.arange(3)], ["a", 5, [1, "b"], [0.5], {}], "a list of whole numbers"),
        (
            str | Sequence[str | Sequence[int]],
            ["f", ["a", [1]]],
            [5, [5], [["a"]]],
            "a text or a list of texts or lists of whole numbers",
        ),
        (Mapping[str, Any], [{}, (("a.b", 1),)], ["a", [1]], "a dict"),
        (Mapping | str | Callable, [{}, "f", len], [5], "a dict or a text or a function"),
        (tuple[str, ...], [("a",), ["a", "b"]], ["a", (1,)], "a list of texts"),
        (str | None, ["a", None], [5], "a text"),
        (Any, [5, "a", None], [], "Any"),
        (np.ndarray, [5], [], "ndarray"),
    ],
)
def test_what_suits_a_hint_by_hand(hint, good, wrong, words):
    assert [x for x in good if not type_hints.suits(x, hint)] == [x for x in wrong if type_hints.suits(x, hint)] == []
    assert type_hints.named(hint) == words


class Nothing:
    """Of no type that a keyword has."""


NAMED = [(noun, name) for noun in ARGUMENTS for name in known(noun)]


@pytest.mark.parametrize("noun", sorted({noun for noun, _ in NAMED}))
def test_every_function_refuses_what_its_signature_does_not_take(noun):
    checked = 0
    for _, name in (pair for pair in NAMED if pair[0] == noun):
        function = find(name, noun)
        function = getattr(function, "prepare", function) if noun == "processors" else function
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        type_hints.check(function, {p.name: p.default for p in parameters if p.default is not p.empty}, name)  # its defaults do
        for p in parameters:
            if not type_hints.suits(Nothing(), p.annotation):
                with pytest.raises(UserError, match=rf"config: {name}: {p.name}=.*; it takes "):
                    bind(function, {p.name: Nothing()}, name)
                checked += 1
    assert checked or noun == "merging"  # whose settings may all go by name and depth


def test_an_endpoint_says_what_its_keywords_take():
    with pytest.raises(UserError, match="config: endpoint: concurrency='many'; it takes a whole number"):
        bind(endpoint.of, {"url": "http://x", "model": "m", "concurrency": "many"}, "endpoint")


def test_a_merges_settings_may_go_by_name_and_depth():
    bind(find("sparse.ties", "merging"), {"strength": {"mlp": 1.0, "": [0.0, 0.5]}, "normalize": False}, "ties")
