"""Which functions of PyTorch a static graph may call.

A checkpoint names the functions that it calls, and a checkpoint may come from anywhere. So there is a list: functions
that only compute an answer from their arguments, check their indices, and touch neither files nor other memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch

from mono_quant.errors import CheckpointError

# Arithmetic on sizes.
PYTHON_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "neg": operator.neg,
    "getitem": operator.getitem,
    "sym_max": torch.sym_max,
    "sym_min": torch.sym_min,
    "sym_int": torch.sym_int,
    "sym_float": torch.sym_float,
}

_ELEMENTWISE: Final = """
    abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil
    celu clamp clamp_max clamp_min clip copysign cos cosh deg2rad div elu eq erf erfc erfinv exp exp2 expm1 float_power
    floor floor_divide fmax fmin fmod frac ge gelu glu gt hardshrink hardsigmoid hardswish hardtanh isclose isfinite
    isinf isnan le leaky_relu lerp log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not
    logical_or logical_xor logit lt masked_fill maximum minimum mish mul nan_to_num ne neg positive pow prelu rad2deg
    reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink
    special_expit special_log_softmax special_softmax sqrt square sub tan tanh threshold true_divide trunc where xlogy
"""

_REDUCTIONS: Final = """
    all amax amin any argmax argmin argsort count_nonzero cumprod cumsum frobenius_norm linalg_norm linalg_vector_norm
    log_softmax _log_softmax logcumsumexp logsumexp max mean median min nansum norm prod softmax _softmax sort
    std std_mean sum topk unique_dim var var_mean
"""

_MOVES: Final = """
    adjoint alias atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to cat channel_shuffle chunk clone concat
    concatenate constant_pad_nd contiguous detach diag_embed diagonal dropout dsplit dstack expand expand_as flatten
    flip fliplr flipud gather hsplit hstack index index_put index_select lift_fresh lift_fresh_copy meshgrid movedim
    narrow nonzero one_hot pad permute pixel_shuffle pixel_unshuffle ravel reflection_pad1d reflection_pad2d
    reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape reshape_as
    roll rot90 scatter scatter_add select select_scatter slice slice_scatter split split_with_sizes squeeze stack
    swapaxes swapdims sym_numel sym_size sym_storage_offset sym_stride t take_along_dim tensor_split tile to _to_copy
    transpose tril triu type_as unbind unflatten unfold unsqueeze view view_as vsplit vstack _unsafe_view
"""

_LAYERS: Final = """
    adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d addbmm addmm addmv avg_pool1d avg_pool2d avg_pool3d
    baddbmm batch_norm bilinear bmm cdist conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution cosine_similarity cross dot einsum embedding fft_fft fft_ifft fft_irfft fft_rfft grid_sampler
    grid_sampler_2d grid_sampler_3d group_norm gru im2col instance_norm inner kron layer_norm linalg_cross
    linalg_matmul linear lstm matmul max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d
    max_pool3d_with_indices mm mv native_group_norm native_layer_norm _native_batch_norm_legit_no_training outer
    pairwise_distance rms_norm rnn_relu rnn_tanh scaled_dot_product_attention tensordot upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
"""

_CREATION: Final = """
    arange eye full full_like linspace new_full new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like
"""

ATEN_FUNCTIONS: Final = frozenset((_ELEMENTWISE + _REDUCTIONS + _MOVES + _LAYERS + _CREATION).split())


def function_name(function: Any) -> str | None:
    """Answer the name by which :func:`find_function` finds a function, or ``None`` if it would not."""
    if isinstance(function, torch._ops.OpOverload):
        return str(function) if function.namespace == "aten" and _is_allowed(function) else None
    for name, known in PYTHON_FUNCTIONS.items():
        if function is known:
            return f"python.{name}"
    return None


def find_function(name: str) -> Callable[..., Any]:
    """Answer the function of a name.

    Raises:
        CheckpointError: There is none, or it is not one of those that static graphs may call.
    """
    namespace, _, rest = name.partition(".")
    if namespace == "python" and rest in PYTHON_FUNCTIONS:
        return PYTHON_FUNCTIONS[rest]
    packet_name, _, overload = rest.partition(".")
    if namespace == "aten" and packet_name in ATEN_FUNCTIONS:
        function = getattr(getattr(torch.ops.aten, packet_name, None), overload, None)
        if isinstance(function, torch._ops.OpOverload) and _is_allowed(function):
            return function
    raise CheckpointError(f"a static graph calls {name!r}, which is not a function that this version allows")


def _is_allowed(function: torch._ops.OpOverload) -> bool:
    """Say whether a function is on the list, in a form that writes to none of its arguments."""
    schema = function._schema
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    return not writes and schema.name.removeprefix("aten::") in ATEN_FUNCTIONS
