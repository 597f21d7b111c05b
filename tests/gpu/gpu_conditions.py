"""Every place where the code asks whether there is a GPU, found in its syntax, and modules in which the answer is yes.

A condition is the name ON_GPU, a call of torch.cuda.is_available, a comparison with "cuda", or the whole of what `and`,
`or` and `not` make of one. It has been met with a GPU once it had a value that it cannot have without one, or, where
it can have any value without one, once the question in it was asked.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("appliance", "serve")
RECORD = "__seen_with_a_gpu__"


def conditions() -> set[str]:
    """All of the product's, each as file:line:column and its text."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {name for path in paths for name in Conditions(path.read_text(), _place(path)).names}


def answer_yes(seen: set[str]) -> None:
    """Have the product's modules that are imported from now on find a GPU, which is the processor.

    What is in `seen` then are the conditions that were seen with a GPU. Only those modules are told so: libraries and
    tests see the machine as it is.
    """
    sys.meta_path.insert(0, _Finder(seen))


class Conditions(ast.NodeTransformer):
    """The conditions in a source, by `names`, and its syntax tree with all of them answered yes and recorded."""

    def __init__(self, source: str, place: str) -> None:
        self.names: list[str] = []
        self._place = place
        tree = ast.parse(source)
        asked = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and _is_call(node.value)]
        self._variables = {"ON_GPU", *(target.id for node in asked for target in node.targets if _is_name(target))}
        self.answered = ast.fix_missing_locations(self.visit(tree))

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and self._asks(node):
            return self._answered(node)
        if isinstance(node, ast.Constant) and node.value == "cuda":
            return ast.copy_location(ast.Constant("cpu"), node)
        return self.generic_visit(node)

    def _is_question(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self._variables and isinstance(node.ctx, ast.Load)
        return _is_call(node) or (isinstance(node, ast.Compare) and any(map(_is_cuda, (node.left, *node.comparators))))

    def _asks(self, node: ast.expr) -> bool:
        """Whether a question is among what `and`, `or` and `not` make this of."""
        return self._is_question(node) or any(map(self._asks, _parts(node)))

    def _answered(self, condition: ast.expr) -> ast.expr:
        name = f"{self._place}:{condition.lineno}:{condition.col_offset} {ast.unparse(condition)}"
        self.names.append(name)
        without = self._without_a_gpu(condition)
        answered = self._with_answers(condition, name, wanted=without is None)
        return answered if without is None else _recorded(answered, name, wanted=not without)

    def _with_answers(self, node: ast.expr, name: str, *, wanted: bool) -> ast.expr:
        """`node` with its questions answered yes, and with `wanted` each of them recorded as it is asked."""
        if self._is_question(node):
            known = isinstance(node, ast.Compare)  # which has the right answer by itself
            answer = self.generic_visit(node) if known else ast.copy_location(ast.Constant(True), node)
            return _recorded(answer, name, wanted=True) if wanted else answer
        if isinstance(node, ast.BoolOp):
            node.values = [self._with_answers(value, name, wanted=wanted) for value in node.values]
            return node
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self._with_answers(node.operand, name, wanted=wanted)
            return node
        return self.visit(node)

    def _without_a_gpu(self, node: ast.expr) -> bool | None:
        """The value that the condition has on any machine without a GPU; None: that depends on more."""
        if self._is_question(node):
            return False
        values = [self._without_a_gpu(part) for part in _parts(node)]
        if isinstance(node, ast.UnaryOp) and values:
            return None if values[0] is None else not values[0]
        if isinstance(node, ast.BoolOp):
            decisive = isinstance(node.op, ast.Or)
            return decisive if decisive in values else None if None in values else not decisive
        return None


class _Finder(MetaPathFinder):
    def __init__(self, seen: set[str]) -> None:
        self._seen = seen

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path, self._seen)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, seen: set[str]) -> None:
        super().__init__(name, path)
        self._seen = seen

    def get_code(self, name: str) -> CodeType:
        """Compiled anew each time: what is kept beside the source is what other processes import."""
        tree = Conditions(Path(self.path).read_text(), _place(Path(self.path))).answered
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: Any) -> None:
        setattr(module, RECORD, self._record)
        super().exec_module(module)

    def _record(self, name: str, value: Any, wanted: bool) -> Any:
        if bool(value) == wanted:
            self._seen.add(name)
        return value


def _recorded(value: ast.expr, name: str, *, wanted: bool) -> ast.expr:
    call = ast.Call(ast.Name(RECORD, ast.Load()), [ast.Constant(name), value, ast.Constant(wanted)], [])
    return ast.copy_location(call, value)


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BoolOp):
        yield from node.values
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("cuda.is_available")


def _is_cuda(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == "cuda"


def _place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
