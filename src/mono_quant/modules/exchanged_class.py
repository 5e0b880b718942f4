"""Modules that change nothing but their class, to one that derives from it, and get their own back.

So they keep their place, name, modules, parameters and buffers, what is saved of them stays as it was, and
``isinstance`` goes on as before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from mono_quant.modules.compiled_layer import number_layer
from mono_quant.modules.swapped_tensors import let_go_before_swaps


class ExchangedClass(nn.Module):
    """A base for what takes the place of a module's class: a subclass of one that derives from this, and of the own.

    Attributes:
        float_type: The module's own class.
        cache_name: The attribute that holds what was gathered for operators; of no other module's concern.
        number: By which compiled graphs call the module.
    """

    float_type: type[nn.Module]
    cache_name: ClassVar[str]
    number: int

    @classmethod
    @abstractmethod
    def derived(cls, float_type: type[nn.Module]) -> type[Self]:
        """Answer the one class that takes the place of ``float_type``."""

    @classmethod
    def take_place(cls, module: nn.Module) -> None:
        """Exchange the class of ``module``, whose class is its own."""
        module.__class__ = cls.derived(type(module))
        module.__dict__["number"] = number_layer(module)

    def give_back(self) -> None:
        """Become a module of the own class again."""
        for name in (self.cache_name, "number"):
            self.__dict__.pop(name, None)
        self.__class__ = self.float_type  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in (self.cache_name, "number")}
        return _new, (type(self).__bases__[0], self.float_type), state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The linear layers leave their tiles: nobody else may hold them.
        self.__dict__.pop(self.cache_name, None)
        let_go_before_swaps()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        let_go_before_swaps()  # before the modules inside are loaded
        super()._load_from_state_dict(state_dict, *args, **kwargs)


def _new(base: type[ExchangedClass], float_type: type[nn.Module]) -> nn.Module:
    kind = base.derived(float_type)
    module = kind.__new__(kind)
    module.__dict__["number"] = number_layer(module)
    return module


def restore_layers(model: nn.Module) -> None:
    """Give all in ``model`` that :func:`mono_quant.modules.fuse_layers` has changed their own classes back."""
    for module in model.modules():
        if isinstance(module, ExchangedClass):
            module.give_back()


def qualified_name(kind: type) -> str:
    """Answer the name by which a class of an optional library is registered."""
    return f"{kind.__module__}.{kind.__qualname__}"
