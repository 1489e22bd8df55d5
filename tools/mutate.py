"""Do the tests notice? Change a module at random places, one at a time, and run its tests.

    python tools/mutate.py gossamer.core.masks tests/core/test_masks.py [--count 20] [--seed 0]

Operators and constants are changed in a copy of the source tree; annotations, docstrings,
messages and ``__all__`` are left alone. What the tests do not notice is printed: equivalent, or a
test that is missing. Exit code 1 when anything lives.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from gossamer import _native

ROOT = Path(__file__).resolve().parents[1]
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.Pow: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
Change = tuple[ast.AST, str, Callable[[], None]]


def changes(tree: ast.Module) -> Iterator[Change]:
    """Every place that can be changed: the node, what is done, and the doing."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield from _at(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "exc", "msg"):
                continue
            below = value if isinstance(value, list) else [value]
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in below):
                break
            waiting += [b for b in below if isinstance(b, ast.AST)]


def _at(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            new = SWAPS[type(op)]()
            do = partial(node.ops.__setitem__, i, new)
            yield node, f"{type(op).__name__} {i} to {type(new).__name__}", do
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        kind = SWAPS[type(node.op)]
        yield node, kind.__name__, lambda: setattr(node, "op", kind())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, "without not", lambda: setattr(node, "op", ast.UAdd()) or _truth(node)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        value = not node.value
        yield node, str(value), lambda: setattr(node, "value", value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        more = node.value + 1
        yield node, f"{node.value} to {more}", lambda: setattr(node, "value", more)


def _truth(node: ast.UnaryOp) -> None:
    node.operand = ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])


def forked(source: Path, arguments: list[str], seconds: int) -> tuple[int, str]:
    """The exit code of pytest with the library below ``source``, and what it told.

    In a fork of this process, where torch is imported already. Over its seconds of processor time,
    and over twenty times as many of waiting, it is killed: the code is then below 0.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as told:
        child = os.fork()
        if not child:
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
                signal.alarm(20 * seconds)
                os.dup2(told.fileno(), 1)
                os.dup2(told.fileno(), 2)
                os.chdir(ROOT)
                # an editable installation's finder would come first
                sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
                sys.path[0] = str(source)
                for name in [n for n in sys.modules if n.split(".")[0] == "gossamer"]:
                    del sys.modules[name]
                found = importlib.import_module("gossamer").__file__
                assert str(found).startswith(str(source)), found
                code = int(pytest.main(arguments))
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
                code = 70
            os._exit(code)
        _, status = os.waitpid(child, 0)
        told.seek(0)
        return os.waitstatus_to_exitcode(status), told.read()


def main() -> int:
    """Run the mutants of one module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=120, help="of processor time for a run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    place = Path("src", *given.module.split(".")).with_suffix(".py")
    source = (ROOT / place).read_text()
    total = len(list(changes(ast.parse(source))))
    chosen = sorted(random.Random(given.seed).sample(range(total), min(given.count, total)))
    living = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "src")
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        built = Path(_native.__file__).parent  # an editable installation keeps its kernels apart
        for kernel in built.glob("*.so"):
            shutil.copy(kernel, copy / "gossamer" / "_native")
        inside = copy.joinpath(*place.parts[1:])
        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]

        def run() -> tuple[int, str]:
            return forked(copy, [*options, str(inside), *given.tests], given.seconds)

        code, told = run()
        if code:
            print(f"{told}\nthe tests fail without any change ({code})")
            return 2
        for index in chosen:
            tree = ast.parse(source)
            node, what, do = list(changes(tree))[index]
            line = source.splitlines()[node.lineno - 1].strip()  # type: ignore[attr-defined]
            do()
            inside.write_text(ast.unparse(ast.fix_missing_locations(tree)))
            code, told = run()
            # 1: a test failed; otherwise it cannot be imported, or died of a signal
            if code == 0 or (code > 1 and "Error" not in told):
                living += 1
                print(f"lives: line {node.lineno}:{node.col_offset}, {what}: {line}", flush=True)  # type: ignore[attr-defined]
    print(f"{given.module}: {len(chosen) - living} of {len(chosen)} noticed")
    return int(bool(living))


if __name__ == "__main__":
    sys.exit(main())
