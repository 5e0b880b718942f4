"""Building: what is left where the kernels do not compile, and what MONO_QUANT_BUILD asks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Compiles nothing, but writes the file that it is asked for.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then echo built > "$2"; fi
    shift
done
"""


class Tree:
    """A source tree with a stub in the place of torch and a compiler that takes no time.

    Args:
        root: Where to put it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "src" / "mono_quant"
        self.package.mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, root)
        for name in ("__init__.py", "_version.py"):
            shutil.copy(ROOT / "src" / "mono_quant" / name, self.package)
        stub = root / "stubs" / "torch"
        stable = stub / "include" / "torch" / "csrc" / "stable"
        stable.mkdir(parents=True)
        (stub / "__init__.py").write_text('__version__ = "2.10.0"\n')
        (stable / "version.h").touch()
        self.compiler = root / "compiler"
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(0o755)

    def run(self, *arguments: str, compiler: str | None = None, mode: str = "auto") -> subprocess.CompletedProcess[str]:
        """Run setup.py and answer how it went."""
        given = {"PYTHONPATH": "stubs", "CXX": compiler or str(self.compiler), "MONO_QUANT_BUILD": mode}
        return subprocess.run(
            [sys.executable, "setup.py", *arguments],
            cwd=self.root, env=os.environ | given, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def built(self) -> list[str]:
        """Answer what is in the native library that would be installed; empty if there is none."""
        return [path.read_text().strip() for path in self.root.glob("build/*/mono_quant/_native.so")]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_library_of_an_earlier_build_is_not_installed_where_the_compiler_fails(tree: Tree) -> None:
    assert tree.run("build").returncode == 0
    assert tree.built() == ["built"]
    done = tree.run("build", compiler="false")
    assert done.returncode == 0
    assert "installing without native kernels: the compiler failed" in done.stderr
    assert tree.built() == []


def test_nor_does_it_stay_in_the_source_tree_of_an_installation_in_place(tree: Tree) -> None:
    library = tree.package / "_native.so"
    assert tree.run("build_ext", "--inplace").returncode == 0
    assert library.read_text().strip() == "built"
    assert tree.run("build_ext", "--inplace", compiler="false").returncode == 0
    assert not library.exists()


@pytest.mark.parametrize(
    "command", [("editable_wheel", "--dist-dir", "dist"), ("build_ext", "--inplace")], ids="/".join
)
@pytest.mark.parametrize("reason", ["off", "no compiler", "compiler fails"])
def test_an_installation_in_place_without_kernels_has_none_of_an_earlier_one(
    tree: Tree, command: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tree.package / "_native.so"
    done = tree.run(*command)
    assert done.returncode == 0, done.stderr
    assert library.read_text().strip() == "built"
    if reason == "no compiler":
        monkeypatch.setenv("PATH", "")
    compilers = {"off": None, "no compiler": "missing", "compiler fails": "false"}
    done = tree.run(*command, compiler=compilers[reason], mode="off" if reason == "off" else "auto")
    assert done.returncode == 0, done.stderr
    assert not library.exists()
    said = [line for line in done.stderr.splitlines() if "removed" in line]
    assert said == [f"mono_quant: removed the native kernels of an earlier build, {library}"]
    if reason == "off":
        done = tree.run(*command, mode="off")
        assert done.returncode == 0
        assert "removed" not in done.stderr


@pytest.mark.parametrize("command", [("bdist_wheel",), ("egg_info",)], ids=lambda command: command[0])
def test_what_is_not_installed_in_place_leaves_the_source_tree_alone(tree: Tree, command: tuple[str, ...]) -> None:
    library = tree.package / "_native.so"
    library.write_text("of an installation in place")
    done = tree.run(*command, mode="off")
    assert done.returncode == 0, done.stderr
    assert library.exists()


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_library_in_the_source_tree_is_installed_by_no_other_build(tree: Tree, mode: str) -> None:
    (tree.package / "_native.so").write_text("old")
    assert tree.run("build", compiler="false", mode=mode).returncode == 0
    assert tree.built() == []
    assert tree.run("build").returncode == 0
    assert tree.built() == ["built"]


def test_a_failed_compiler_is_an_error_where_kernels_are_required(tree: Tree) -> None:
    done = tree.run("build", compiler="false", mode="require")
    assert done.returncode != 0
    assert "no native kernels: the compiler failed" in done.stderr


def test_an_empty_mode_counts_as_unset(tree: Tree) -> None:
    done = tree.run("build", mode="")
    assert done.returncode == 0, done.stderr
    assert tree.built() == ["built"]


def test_an_unknown_mode_is_an_error_that_lists_the_right_ones(tree: Tree) -> None:
    done = tree.run("build", mode="never")
    assert done.returncode != 0
    assert "MONO_QUANT_BUILD='never' is not one of auto, require, off" in done.stderr
