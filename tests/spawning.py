"""A process that is being spawned, as far as pickling sees it."""

from __future__ import annotations


class SpawnedChild:
    """Collects the descriptors that a spawned child is to inherit, as multiprocessing's own class does."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def duplicate_for_child(self, descriptor: int) -> int:
        self.descriptors.append(descriptor)
        return descriptor

    def DupFd(self, descriptor: int) -> int:  # noqa: N802 - multiprocessing's name
        return descriptor
