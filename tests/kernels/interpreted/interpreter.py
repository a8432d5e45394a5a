"""Triton's interpreter, put right where it is wrong or crawls. Importing this module does it; seen on 3.7 to 3.9.

- bfloat16: Triton keeps it as uint16 and adds, multiplies and sums the bit patterns, without an error. Here every
  operation goes through float32 and rounds once, to nearest even, as the hardware does.
- casts to bfloat16: Triton truncates; here they round to nearest even.
- fma: Triton rounds the product; here the sum alone is rounded, as the hardware does.
- associative_scan and reduce with a combine function: Triton calls it once an element; here once a level of a tree,
  on whole blocks. The order of the sums is another one, as it is on a GPU.
- a comparison of two scalars that meets a block: its type is that of what was compared, and so Triton makes the block
  one of integers, which 3.9 then refuses as a mask; here a block of booleans.
- @triton.jit functions called from a kernel, tl.sum among them: Triton prepares the whole of triton.language anew at
  each call; here once a launch.
- what follows from the type of a block alone (its shape, size, name, numpy's type): Triton works it out for every
  result of every operation; here once a type.
- sums and products of integers: Triton does each once more in 64 bits, and without its debug mode forgets the result.

What the interpreter cannot show: races, layouts, tf32's rounding, what a masked load without `other` returns.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as upstream
from triton.runtime.interpreter import TensorHandle


def widen(handle: TensorHandle) -> np.ndarray:
    """A handle's numbers as numpy can compute with them: bfloat16 as float32, the rest as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 to the bit patterns of the nearest bfloat16, ties to even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def narrow(values: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """The inverse of `widen`. A comparison's booleans stay booleans."""
    if dtype.scalar == tl.bfloat16 and values.dtype != np.bool_:
        values = round_to_bfloat16(values)
    return TensorHandle(values, dtype.scalar)


def is_bfloat16(*handles: TensorHandle) -> bool:
    return any(handle.dtype.scalar == tl.bfloat16 for handle in handles)


class Builder(upstream.InterpreterBuilder):
    """The operations of a kernel on numpy arrays, with bfloat16 as numbers."""

    def binary_op(self, lhs, rhs, op):
        if not is_bfloat16(lhs):
            return super().binary_op(lhs, rhs, op)
        return narrow(op(widen(lhs), widen(rhs)), tl.bfloat16)

    def unary_op(self, arg, op):
        return narrow(op(widen(arg)), arg.dtype) if is_bfloat16(arg) else super().unary_op(arg, op)

    def ternary_op(self, lhs, rhs, other, op):
        if not is_bfloat16(other) or op is np.where:  # a choice between bit patterns is one between numbers
            return super().ternary_op(lhs, rhs, other, op)
        return narrow(op(widen(lhs), widen(rhs), widen(other)), tl.bfloat16)

    def create_fma(self, x, y, z):
        """One rounding, which for float32 is float64's and then its own."""
        exact = widen(x).astype(np.float64) * widen(y) + widen(z)
        return narrow(exact.astype(widen(z).dtype), z.dtype)

    def create_rsqrt(self, arg):
        return narrow(1 / np.sqrt(widen(arg)), arg.dtype)

    def create_splat(self, ret_ty, arg):
        if arg.data.dtype == np.bool_:
            return TensorHandle(np.full(ret_ty.shape, arg.data), tl.int1)
        return super().create_splat(ret_ty, arg)

    def cast_impl(self, src, dst_type):
        target = dst_type.scalar
        if not is_bfloat16(src):
            if target == tl.bfloat16:
                return narrow(src.data.astype(np.float32), target)
            return super().cast_impl(src, dst_type)
        wide = TensorHandle(widen(src), tl.float32)
        if target in (tl.float32, tl.bfloat16):
            return wide if target == tl.float32 else src
        return super().cast_impl(wide, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (TensorHandle(widen(x), tl.float32) if is_bfloat16(x) else x for x in (a, b))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)


def block(values: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    """A tl.tensor of numpy values that `widen` made or would have made."""
    values = np.ascontiguousarray(values)
    kind = tl.block_type(dtype.scalar, list(values.shape)) if values.ndim else dtype.scalar
    return tl.core.tensor(narrow(values, dtype), kind)


class _Vectorised:
    """A reduction or a scan whose combine function works on whole blocks, bfloat16 in float32."""

    def apply_impl(self, input):
        dtypes = [x.dtype for x in input]
        wide = tuple(block(widen(x.handle), tl.float32 if x.dtype == tl.bfloat16 else x.dtype) for x in input)
        results = super().apply_impl(wide)
        results = results if isinstance(results, (list, tuple)) else (results,)
        return tuple(
            block(x.handle.data if x.type.is_block() else x.handle.data.reshape(()), tl.bfloat16)
            if dtype == tl.bfloat16 and x.dtype == tl.float32  # not the index of an argmax
            else x
            for x, dtype in zip(results, dtypes, strict=False)
        )

    def combine(self, left, right, dtypes):
        """The combine function on two lists of arrays; returns one."""
        blocks = [block(x, dtype) for half in (left, right) for x, dtype in zip(half, dtypes, strict=True)]
        results = self.combine_fn.fn(*blocks)
        results = results if isinstance(results, (list, tuple)) else (results,)
        return [np.broadcast_to(x.handle.data, left[0].shape) for x in results]


class ReduceOps(_Vectorised, upstream.ReduceOps):
    def generic_reduce(self, input):
        dtypes = [x.dtype for x in input]
        rank = len(input[0].shape)
        values = [
            x.handle.data.ravel() if self.axis is None else np.moveaxis(x.handle.data, self.axis, 0) for x in input
        ]
        while len(values[0]) > 1:  # blocks are powers of two
            values = self.combine([x[0::2] for x in values], [x[1::2] for x in values], dtypes)
        results = [x[0] for x in values]
        if self.keep_dims:
            results = [x.reshape((1,) * rank) if self.axis is None else np.expand_dims(x, self.axis) for x in results]
        return [self.to_tensor(x if x.ndim else x.item(), dtype) for x, dtype in zip(results, dtypes, strict=True)]


class ScanOps(_Vectorised, upstream.ScanOps):
    def generic_scan(self, input):
        dtypes = [x.dtype for x in input]
        values = [np.moveaxis(x.handle.data, self.axis, 0) for x in input]
        reach = 1
        while reach < len(values[0]):  # Hillis and Steele
            reached = self.combine(
                [np.roll(x, reach, 0) for x in values], values, dtypes
            )  # a block's size is a power of 2
            values = [np.concatenate([x[:reach], y[reach:]]) for x, y in zip(values, reached, strict=True)]
            reach *= 2
        return [self.to_tensor(np.moveaxis(x, 0, self.axis), dtype) for x, dtype in zip(values, dtypes, strict=True)]


class _Namespace:
    """Stands for a kernel that sees both names under which functions reach triton.language."""

    __globals__ = {"tl": tl, "core": tl.core}


_patch_lang = upstream._patch_lang


def _call_device_function(self, *args, **kwargs):
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise upstream.InterpreterError(repr(error)) from error


_init_type, _init_tensor = tl.block_type.__init__, tl.core.tensor.__init__
_types, _tensors = {}, {}  # what they are made of, but for the element's type and the numbers
_numpy_dtype = functools.cache(upstream._get_np_dtype)


def _init_known_type(self, element_ty: tl.dtype, shape) -> None:
    key = element_ty.name, *(getattr(size, "value", size) for size in shape)
    if key not in _types:
        _init_type(self, element_ty, shape)
        _types[key] = vars(self).copy()
    vars(self).update(_types[key], element_ty=element_ty)


def _init_known_tensor(self, handle: TensorHandle, type: tl.dtype) -> None:
    if type.name not in _tensors:
        _init_tensor(self, handle, type)
        _tensors[type.name] = vars(self).copy()
    vars(self).update(_tensors[type.name], handle=handle, type=type, dtype=type.scalar)


def _get_np_dtype(type: tl.dtype) -> np.dtype:
    return np.dtype(np.uint64) if type.scalar.is_ptr() else _numpy_dtype(type.scalar)


tl.block_type.__init__, tl.core.tensor.__init__ = _init_known_type, _init_known_tensor
upstream._get_np_dtype = _get_np_dtype
upstream.interpreter_builder.__class__ = Builder
upstream.interpreter_builder.options = upstream.InterpreterOptions(sanitize_overflow=False)
upstream.ReduceOps, upstream.ScanOps = ReduceOps, ScanOps
upstream._patch_lang = lambda fn: _patch_lang(_Namespace)
upstream.InterpretedFunction.__call__ = _call_device_function
