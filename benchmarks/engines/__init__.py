"""The ways to run MiniLM that are compared: one adapter a file, each importing its library at its top.

An adapter has ``NAME``, ``DISTRIBUTIONS`` (whose versions the results record) and ``build(directory) -> Engine``. One
whose library is not installed is left out, and the results say so.
"""

from benchmarks.engines.engine import ADAPTERS, BASELINE, BuiltEngine, Engine, Unavailable, build_engine

__all__ = ["ADAPTERS", "BASELINE", "BuiltEngine", "Engine", "Unavailable", "build_engine"]
