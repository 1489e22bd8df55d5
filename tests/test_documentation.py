"""What documentation, examples and benchmarks import is there."""

import ast
import re
from importlib import import_module, util
from pathlib import Path

import pytest

from gossamer.core.tables import GROUP
from gossamer.distribute import CODECS
from gossamer.prune.scores import SCORES
from gossamer.quantize.fewbits import QUANTIZERS

ROOT = Path(__file__).parents[1]
CARDS = {path.name: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [*sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]


def code(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".py":
        return text
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_import_of_the_library_works(path: Path) -> None:
    for node in ast.walk(ast.parse(code(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "gossamer":
                    import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "gossamer":
            module = import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):  # a module that nothing has imported yet
                    import_module(f"{node.module}.{alias.name}")


def found(dotted: str) -> bool:
    """Whether it is a module, or a name in the longest part of it that is one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            at: object = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return all((at := getattr(at, part, None)) is not None for part in parts[end:])
    return False


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_dotted_name_is_there(path: Path) -> None:
    dotted = set(re.findall(r"(?<![\w./-])gossamer(?:\.[A-Za-z_]\w*)+", path.read_text()))
    assert sorted(d for d in dotted - {GROUP} if not found(d)) == []


def test_the_readme_leads_to_every_card() -> None:
    text = (ROOT / "README.md").read_text()
    assert sorted(card for card in CARDS if f"(docs/methods/{card})" not in text) == []


@pytest.mark.parametrize("name", [*SCORES, *QUANTIZERS, *CODECS])
def test_what_a_table_holds_is_on_a_card(name: str) -> None:
    word = re.compile(rf"(?<![\w-]){name}(?![a-z_])")  # of gradient codecs a number may follow
    assert [card for card, text in CARDS.items() if word.search(text)] != []


def test_the_reference_reads_docstrings_by_the_parameter() -> None:
    pytest.importorskip("griffe")
    spec = util.spec_from_file_location("docs", ROOT / "tools" / "docs_docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = """Sum, as :func:`gossamer.core.sums.exact` has it.

Args:
    a, b: of one shape,
        and dtype.
    *rest, last:
        as for b.

Raises nothing:
    >>> total([1], [2])
    [3]

a, b: in a sentence, stay.
"""
    assert (
        module.rewritten(text)
        == """Sum, as `exact` has it.

Args:
    a: of one shape,
        and dtype.
    b: of one shape,
        and dtype.
    *rest:
        as for b.
    last:
        as for b.

Raises nothing:
    ```pycon
    >>> total([1], [2])
    [3]
    ```

a, b: in a sentence, stay.
"""
    )
