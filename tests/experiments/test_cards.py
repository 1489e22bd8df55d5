"""Sentences with figures in the README and the cards say what the results files say."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import figures_bits
import figures_runtime
import figures_sparse

ROOT = Path(__file__).parents[2]
NUMBER = r"(-?(?:\d[\d,]*)?\.?\d+)"
Data = dict[str, Any]
FIGURES = figures_sparse.ROWS + figures_bits.ROWS + figures_runtime.ROWS


@functools.cache
def _results(name: str) -> Data:
    data: Data = json.loads((ROOT / "results" / f"{name}.json").read_text())
    return data


@functools.cache
def _page(name: str) -> str:
    return (ROOT / name).read_text()


def wrong(text: str, words: str, figures: Sequence[float]) -> list[str]:
    """The figures of the words' one place in the text that do not round to what is given."""
    pattern = NUMBER.join(re.escape(part) for part in words.split("{}"))
    places = re.findall(pattern, text)
    if len(places) != 1:
        return [f"{len(places)} places of {words!r}"]
    shown = places[0] if isinstance(places[0], tuple) else (places[0],)
    assert len(shown) == len(figures), words
    found = []
    for number, figure in zip(shown, figures, strict=True):
        decimals = len(number.partition(".")[2])
        # half of the last digit, both ways of a tie, and what binary fractions add
        if abs(float(number.replace(",", "")) - figure) > 0.5 * 10**-decimals + 1e-9:
            found.append(f"{number} is {figure:.6g} in {words!r}")
    return found


@pytest.mark.parametrize(
    ("page", "words", "file", "figures"), FIGURES, ids=[f"{p}-{f}" for p, _, f, _ in FIGURES]
)
def test_the_page_says_what_the_results_say(
    page: str, words: str, file: str, figures: Callable[[Data], Sequence[float]]
) -> None:
    assert wrong(_page(page), words, figures(_results(file))) == []


def test_every_card_with_measurements_is_checked() -> None:
    measured = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs" / "methods").glob("*.md")
        if "## Measured here" in path.read_text()
    }
    assert measured <= {page for page, *_ in FIGURES}


def test_a_wrong_figure_is_noticed() -> None:
    text = "ends at 97.53 ± .14 %, in 1,070 bytes; ends at none"
    words = "ends at {} ± {} %, in {} bytes"
    assert wrong(text, words, [97.5349, 0.135, 1070.4]) == []
    assert wrong(text, words, [97.5351, 0.146, 1069.4]) == [
        f"{said} is {figure} in {words!r}"
        for said, figure in (("97.53", "97.5351"), (".14", "0.146"), ("1,070", "1069.4"))
    ]
    assert wrong(text, "ends in {}", [1]) == ["0 places of 'ends in {}'"]


def test_the_page_of_results_is_made_from_them() -> None:
    from gossamer.experiments.__main__ import page

    assert _page("docs/results.md") == page(ROOT / "results") + "\n"
