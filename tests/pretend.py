"""A pretended GPU: tensors that say they are on ``cuda:0``, computed by the processor, that refuse to meet tensors which are not.

PyTorch's own rules are kept: numbers of no dimension and indices may come from the processor, copies go either way, and nothing on
the device is turned into numpy. So a forgotten ``.to(device)`` fails here as it would there.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
         aten._index_put_impl_.default, aten.set_.source_Tensor}  # fmt: skip


def mapped(kind, change, value):
    """What an operator is given or gives, with every tensor of a kind changed; the general tree of torch takes twenty times as long."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([mapped(kind, change, each) for each in value])
    if isinstance(value, dict):
        return {key: mapped(kind, change, each) for key, each in value.items()}
    return value


@cache
def writes(func):
    """Whether an operator changes what it is given."""
    return func._schema.is_mutable


class OnDevice(Tensor):
    """A tensor of the processor, ``inner``, that is said to be on the device."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=CPU
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_):
        return f"OnDevice({self.inner!r})"

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, *_, **__):
        return self.numpy()

    def data_ptr(self):
        return self.inner.data_ptr()

    def __deepcopy__(self, memo):
        copied = wrapped(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in MIXED:
            written = args[:1] if writes(func) else ()
            mapped(Tensor, lambda each: refuse(func, each, written), (args, kwargs))
        plain_args, plain_kwargs = mapped(OnDevice, lambda each: each.inner, (args, kwargs))
        if plain_kwargs.get("device") is not None:
            plain_kwargs["device"] = CPU
        result = func(*plain_args, **plain_kwargs)
        if writes(func):
            by_inner = {}
            mapped(OnDevice, lambda each: by_inner.setdefault(id(each.inner), each), (args, kwargs))
            return mapped(Tensor, lambda each: by_inner[id(each)] if id(each) in by_inner else wrapped(each), result)
        return mapped(Tensor, wrapped, result)


def refuse(func, tensor, written):
    """Fails on a tensor of the processor, but for numbers that are only read."""
    if not isinstance(tensor, OnDevice) and (tensor.dim() or any(tensor is each for each in written)):
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found one [{tuple(tensor.shape)}] on the cpu"
        )


def wrapped(tensor):
    """Onto the device."""
    return tensor if isinstance(tensor, OnDevice) else OnDevice(tensor)


class Move(torch.autograd.Function):
    """Moves a tensor, and its gradient back."""

    @staticmethod
    def forward(ctx, tensor, there, dtype):
        ctx.there, ctx.dtype = isinstance(tensor, OnDevice), tensor.dtype
        bare = (tensor.inner if ctx.there else tensor).to(dtype, copy=True)
        return wrapped(bare) if there else bare

    @staticmethod
    def backward(ctx, gradient):
        return Move.apply(gradient, ctx.there, ctx.dtype), None, None


def moved(tensor, there, dtype):
    """A copy at one of the two places, or the tensor itself if it is there."""
    dtype = dtype or tensor.dtype
    if isinstance(tensor, OnDevice) == there:
        return Tensor.to(tensor, dtype) if tensor.dtype != dtype else tensor
    return Move.apply(tensor, there, dtype)


class Places(TorchFunctionMode):
    """Understands every ``device`` that is asked for."""

    def __init__(self):
        super().__init__()
        self.before = []

    def __enter__(self):
        self.before.append(torch.__future__.get_overwrite_module_params_on_conversion())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *failure):
        torch.__future__.set_overwrite_module_params_on_conversion(self.before.pop())
        return super().__exit__(*failure)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in (Tensor.cpu, Tensor.cuda):
            return moved(args[0], func is Tensor.cuda, None)
        if func is Tensor.to:
            return self.to(*args, **kwargs)
        if func is Tensor.backward:
            return self.backward(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and name != "_make_wrapper_subclass":
            there = torch.device(device).type == "cuda"
            if there:
                kwargs["device"] = CPU
                generated = func(*mapped(OnDevice, lambda each: each.inner, args), **kwargs)
                return mapped(Tensor, wrapped, generated)
        return func(*args, **kwargs)

    def backward(self, tensor, gradient=None, **_):
        gradient = torch.ones_like(tensor) if gradient is None else gradient
        with self:  # hooks are to understand devices too
            run = torch.autograd.graph._engine_run_backward
            return run((tensor,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)

    def to(self, tensor, *args, **kwargs):
        like = [each for each in args if isinstance(each, Tensor)]
        places = [torch.device(each) for each in (*args, kwargs.get("device")) if isinstance(each, str | torch.device)]
        types = [each for each in (*args, kwargs.get("dtype")) if isinstance(each, torch.dtype)]
        dtype = like[0].dtype if like else types[0] if types else None
        if like or places:
            there = isinstance(like[0], OnDevice) if like else places[0].type == "cuda"
            if not like and places[0].type == "meta":
                return Tensor.to(tensor.inner if isinstance(tensor, OnDevice) else tensor, "meta")
            if isinstance(tensor, OnDevice) != there:
                return moved(tensor, there, dtype)
        rest = {key: value for key, value in kwargs.items() if key in ("copy", "non_blocking")}
        return Tensor.to(tensor, dtype or tensor.dtype, **rest)
