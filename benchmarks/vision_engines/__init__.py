"""The ways to run a convolutional network that are compared: one adapter a file, each importing its library at its top.

An adapter has ``NAME``, ``DISTRIBUTIONS`` (whose versions the results record) and two functions:
``build(model, calibration, directory)`` prepares a model, keeps what it takes to run it in a folder and answers the
seconds that took; ``load(make, directory)`` answers what was kept as a function of images. They are apart so that a
process can run a model without having prepared it.
"""

from benchmarks.vision_engines.engine import (
    ADAPTERS,
    BASELINES,
    Classifier,
    VisionEngine,
    load_engine,
    prepare_engine,
)

__all__ = ["ADAPTERS", "BASELINES", "Classifier", "VisionEngine", "load_engine", "prepare_engine"]
