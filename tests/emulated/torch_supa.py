"""A `supa` device without a card, under the name of the vendor's plugin: PrivateUse1 tensors that wrap CPU tensors.

It shows that nothing is taken for granted of the device: tensors of two devices do not mix, and what a real card does
badly or not at all (float16, float64, complex, shapes that depend on values) is refused. It says nothing of a real
card's numbers or speed. Made with a private function of torch, and for the rest of the process: import it in a
process of its own, with this folder on `PYTHONPATH`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

KIND = "supa"
HOST = torch.device("cpu")
REFUSED_TYPES = (torch.float16, torch.float64, torch.complex64, torch.complex128)
REFUSED_OPERATORS = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::_local_scalar_dense")
COPIES = ("aten::copy_", "aten::_to_copy")  # the only ones that may see two devices

wrong_operators: set[str] = set()  # these give the opposite of what they should
missing_operators: set[str] = set()  # these fall back to the CPU, and say so once, as the vendor's do
lacking_operators: set[str] = set()  # and these raise an error
called_operators: set[str] = set()
seen_shapes: set[tuple[int, ...]] = set()  # of matrix products: kernels are compiled for each


class SupaTensor(torch.Tensor):
    """A tensor of the device; `host` has its numbers."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> SupaTensor:
        if host.dtype in REFUSED_TYPES:
            raise RuntimeError(f"{KIND} has no {host.dtype}")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(KIND, 0),
        )
        tensor.host = host
        return tensor

    def __repr__(self) -> str:
        return f"{KIND}({self.host})"

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(operator, args, kwargs or {})


def call(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"):
        parts = operator.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    name = operator._schema.name
    called_operators.add(name)
    refuse(name, args, kwargs)
    warn_once(name)
    if name in ("aten::mm", "aten::addmm", "aten::bmm"):
        seen_shapes.add(tuple(args[-2].shape))
    if name == "aten::_to_copy":
        return to_copy(args[0], **kwargs)
    result = operator(*tree_map(on_host, args), **tree_map(on_host, kwargs))
    spoil(name, result)
    written = written_argument(operator, args, kwargs)
    if written is not None:
        return written
    is_view = any(returned.alias_info is not None for returned in operator._schema.returns)
    with torch.inference_mode(args[0].is_inference() if is_view else torch.is_inference_mode_enabled()):
        return tree_map(on_device, result)


def refuse(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name in lacking_operators:
        raise NotImplementedError(f"{name} is not there for {KIND}\nand all that torch has to say besides")
    if name in REFUSED_OPERATORS:
        raise RuntimeError(f"{name} waits for the device, or its result's shape does")
    tensors: list[torch.Tensor] = []
    tree_map(lambda value: tensors.append(value) if isinstance(value, torch.Tensor) else None, (args, kwargs))
    if name.startswith("aten::index") and any(tensor.dtype == torch.bool for tensor in tensors[1:]):
        raise RuntimeError(f"{name} by a mask has a shape that depends on values")
    if name not in COPIES and any(tensor.dim() > 0 and not isinstance(tensor, SupaTensor) for tensor in tensors):
        raise RuntimeError(f"{name} is given tensors of {KIND} and of the CPU")


def warn_once(name: str) -> None:
    if name in missing_operators:
        missing_operators.remove(name)
        warnings.warn(
            f"CAUTION: The operator '{name}' is not currently supported on the SUPA backend and will fall back to run "
            "on the CPU. This may have performance implications.",
            stacklevel=2,
        )


def to_copy(tensor: torch.Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    host = on_host(tensor).to(dtype or tensor.dtype, copy=True)
    stays = isinstance(tensor, SupaTensor) if device is None else torch.device(device).type == KIND
    return SupaTensor(host) if stays else host


def spoil(name: str, result: Any) -> None:
    if name in wrong_operators and isinstance(result, torch.Tensor):
        result.neg_()


def written_argument(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor that an in-place operator, or one with `out`, returns."""
    for position, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return kwargs[argument.name] if argument.name in kwargs else args[position]
    return None


def on_host(value: Any) -> Any:
    if isinstance(value, SupaTensor):
        return value.host
    return HOST if isinstance(value, torch.device) and value.type == KIND else value


def on_device(value: Any) -> Any:
    return SupaTensor(value) if isinstance(value, torch.Tensor) else value


def factory(operator: Any) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return SupaTensor(operator(*args, **{**kwargs, "device": HOST}))

    return make


backend_registration._setup_privateuseone_for_python_backend(rename=KIND)
library = torch.library.Library("aten", "IMPL")
for overload in (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.arange.start_step,
):
    library.impl(overload.name(), factory(overload), "PrivateUse1")
