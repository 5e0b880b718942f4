"""Builds the native kernels where a compiler and torch are at hand; everything else is in pyproject.toml.

MONO_QUANT_BUILD=auto (the default) builds if it can and says in one line if it cannot, ``require`` makes that an
error, ``off`` does not try. An installation in place that has no kernels removes those of an earlier one.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
LIBRARY_IN_PLACE = ROOT / "src" / "mono_quant" / "_native.so"
MODES = ("auto", "require", "off")
# The oldest torch the library runs under: the stable interface of 2.10.
TARGET_VERSION = "0x020a000000000000"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512VNNI = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
AVX512BF16 = [*AVX512VNNI, "-mavx512bf16"]
AMX = [*AVX512VNNI, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
# No contraction of a * b + c: a kernel rounds the same way whatever the instruction set.
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
# gcc warns about its own headers: their undefined vectors are meant to be so.
KERNEL = ["-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


class CannotBuildError(Exception):
    """Why there will be no native library."""


def version() -> str:
    """Answer the package's version without importing it."""
    text = (ROOT / "src" / "mono_quant" / "_version.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text)[1]


def build_mode() -> str:
    """Answer what MONO_QUANT_BUILD asks for."""
    mode = os.environ.get("MONO_QUANT_BUILD") or "auto"
    if mode not in MODES:
        sys.exit(f"MONO_QUANT_BUILD={mode!r} is not one of {', '.join(MODES)}")
    return mode


def find_torch() -> Path:
    """Answer the directory of an installed torch that is new enough."""
    try:
        import torch
    except ImportError:
        raise CannotBuildError("torch is not importable at build time (use --no-build-isolation)") from None
    root = Path(torch.__file__).parent
    if not (root / "include" / "torch" / "csrc" / "stable" / "version.h").exists():
        raise CannotBuildError(f"torch {torch.__version__} is older than 2.10")
    return root


def find_compiler() -> str:
    """Answer the C++ compiler to call."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise CannotBuildError("there is no C++ compiler")


def units() -> list[tuple[str, list[str]]]:
    """Answer the translation units for this processor family, each with flags of its own."""
    found = [("kernels_generic.cpp", KERNEL)]
    if platform.machine() in ("x86_64", "AMD64"):
        found += [
            ("kernels_avx2.cpp", KERNEL + AVX2),
            ("kernels_avxvnni.cpp", KERNEL + AVX2),
            ("kernels_avx512vnni.cpp", KERNEL + AVX512VNNI),
            ("kernels_avx512bf16.cpp", KERNEL + AVX512BF16),
            ("kernels_amx.cpp", KERNEL + AMX),
        ]
    return found


def remove_from_source() -> None:
    """Remove what an earlier installation in place has left: it would be loaded as if this one had built it."""
    if LIBRARY_IN_PLACE.exists():
        LIBRARY_IN_PLACE.unlink()
        print(f"mono_quant: removed the native kernels of an earlier build, {LIBRARY_IN_PLACE}", file=sys.stderr)


class BuildNative(build_ext):
    """Compiles csrc/ into mono_quant/_native.so, which links torch's C functions and no Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        if self.inplace and not self.extensions:
            remove_from_source()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # What an earlier build left here would be installed if this one fails.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        try:
            self._build(ext)
        except CannotBuildError as error:
            if build_mode() == "require":
                raise SystemExit(f"mono_quant: no native kernels: {error}") from None
            print(f"mono_quant: installing without native kernels: {error}", file=sys.stderr)
            ext.optional = True
            self.skipped = True

    def copy_extensions_to_source(self) -> None:
        if not getattr(self, "skipped", False):
            super().copy_extensions_to_source()
        else:
            remove_from_source()

    def get_outputs(self) -> list[str]:
        return [] if getattr(self, "skipped", False) else super().get_outputs()

    def _build(self, ext: Extension) -> None:
        torch_root, compiler = find_torch(), find_compiler()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        glue = [
            f"-I{torch_root / 'include'}",
            f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
            f'-DMONO_QUANT_VERSION="{version()}"',
        ]
        jobs = [*((path.name, glue) for path in sorted(CSRC.glob("ops_*.cpp"))), ("isa.cpp", glue), *units()]
        with tempfile.TemporaryDirectory() as directory:

            def compile_one(job: tuple[str, list[str]]) -> str:
                source, flags = job
                output = os.path.join(directory, source + ".o")
                self._call([compiler, *COMMON, *flags, "-c", str(CSRC / source), "-o", output])
                return output

            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, jobs))
            # libtorch_cpu is loaded before this library is: its name suffices, no search path.
            link = [
                "-shared",
                "-Wl,--no-undefined",
                "-Wl,--as-needed",
                "-pthread",
                f"-L{torch_root / 'lib'}",
                "-ltorch_cpu",
            ]
            if sys.platform == "darwin":
                link = ["-shared", "-undefined", "dynamic_lookup"]
            partial = target.with_suffix(".so.partial")
            self._call([compiler, *objects, *link, "-o", str(partial)])
            # A running process keeps the file it has mapped.
            os.replace(partial, target)

    @staticmethod
    def _call(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CannotBuildError(f"the compiler failed: {' '.join(command)}\n{done.stderr[-4000:]}")


class EditableWheel(editable_wheel):
    """What ``pip install -e`` runs; it builds no extensions where there are none."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            remove_from_source()


class TagWheel(bdist_wheel):
    """The library serves every Python 3 of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        return (python, abi, plat) if self.root_is_pure else ("py3", "none", plat)


def extensions() -> list[Extension]:
    """Answer the library as an extension module, or nothing if it cannot be built here."""
    mode = build_mode()
    if mode == "off":
        return []
    try:
        find_torch()
        find_compiler()
    except CannotBuildError as error:
        if mode == "require":
            sys.exit(f"mono_quant: no native kernels: {error}")
        print(f"mono_quant: installing without native kernels: {error}", file=sys.stderr)
        return []
    sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.glob("*.cpp"))
    depends = sorted(str(path.relative_to(ROOT)) for path in CSRC.glob("*.[hi]*"))
    return [Extension("mono_quant._native", sources=sources, depends=depends)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "editable_wheel": EditableWheel, "bdist_wheel": TagWheel},
)
