"""Runs unmodified megatron-core on a machine without a GPU, over gloo.

megatron-core asks `torch.cuda` for devices, streams and random states whatever the backend is. `install`
answers those requests with the CPU: process-wide, only without CUDA, only when called, once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections import defaultdict
from datetime import timedelta
from typing import Any

INSTALLED = "_megatron_octo_cpu"
FACTORIES = (
    *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "eye"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand", "randn", "randint"),
)


def install() -> None:
    """Answer CUDA requests with the CPU from now on. A second call changes nothing.

    Call it before megatron.core is imported: `tensor_parallel.random` binds a torch.cuda function by name.
    """
    import torch

    if torch.cuda.is_available() or hasattr(torch.cuda, INSTALLED):
        return
    setattr(torch.cuda, INSTALLED, True)
    _hide_cuda_packages()
    _redirect_runtime()
    _redirect_devices()
    _drop_device_ids()
    _import_uncompiled()
    _skip_exchange_with_oneself()
    _poll_once_for_all_groups()
    _redirect_megatron_rng()


def _hide_cuda_packages() -> None:
    """Where GPUs are there, but hidden from this process, so are these packages: megatron would take their kernels."""
    for package in ("transformer_engine", "apex"):
        sys.modules[package] = None  # type: ignore[assignment]  # to import it says that it is not there


def _redirect_runtime() -> None:
    """torch.cuda's calls: the current device is the CPU; streams, events and memory counters do nothing."""
    import torch

    cpu = torch.device("cpu")

    class Stream(torch.cpu.Stream):  # its wait_stream, record_event and wait_event already do nothing
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *exc: object) -> None:
            return None

        def synchronize(self) -> None:
            return None

        def query(self) -> bool:
            return True

    class Event(torch.cpu.Event):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def elapsed_time(self, _other: Any) -> float:
            return 0.0

    stream = Stream()
    cuda = torch.cuda
    answers: dict[str, Any] = {
        "current_device": lambda: cpu,  # megatron only hands it on as device=
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_stats": lambda device=None: defaultdict(int),
        "Stream": Stream,
        "Event": Event,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.random.get_rng_state, cuda.random.set_rng_state = answers["get_rng_state"], answers["set_rng_state"]
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None


def _redirect_devices() -> None:
    """`device="cuda"` in torch's factories, `.to("cuda")` and `.cuda()` mean the CPU."""
    import torch
    from torch.distributed import DeviceMesh
    from torch.utils._device import _device_constructors

    _device_constructors()  # what `with torch.device(...)` applies to: it keeps the list of its first call
    cpu = torch.device("cpu")

    def is_cuda(device: Any) -> bool:
        return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False

    def on_cpu(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs and is_cuda(kwargs["device"]):
                kwargs["device"] = cpu
            return function(*args, **kwargs)

        return wrapper

    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))

    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and is_cuda(args[0]):
            args = (cpu, *args[1:])
        if "device" in kwargs and is_cuda(kwargs["device"]):
            kwargs["device"] = cpu
        return tensor_to(self, *args, **kwargs)

    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        if isinstance(result, str) and ".cuda." not in result:
            return result.replace("torch.", "torch.cuda.", 1)  # megatron's optimizers compare these strings
        return result

    torch.Tensor.to, torch.Tensor.type = to, type_
    from_group = DeviceMesh.from_group

    def mesh(group: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return from_group(group, "cpu" if is_cuda(device_type) else device_type, *args, **kwargs)

    DeviceMesh.from_group = staticmethod(mesh)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _drop_device_ids() -> None:
    """gloo's barrier takes no device_ids."""
    import torch.distributed as dist

    barrier = dist.barrier
    dist.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group=group, async_op=async_op)


def _skip_exchange_with_oneself() -> None:
    """A data-parallel group of one rank has nothing to reduce or gather; gloo copies the whole buffer to find out."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    def between_ranks(exchange: Any) -> Any:
        @functools.wraps(exchange)
        def wrapper(output: Any, source: Any, *, group: Any, **kwargs: Any) -> Any:
            return None if group.size() == 1 else exchange(output, source, group=group, **kwargs)

        return wrapper

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, between_ranks(getattr(buffers, name)))


def _poll_once_for_all_groups() -> None:
    """gloo gives each group a thread that wakes a hundred times a second, and megatron makes dozens of groups.

    One device serves them all, and the groups of a later run too.
    """
    from torch.distributed import ProcessGroupGloo, distributed_c10d

    class Group(ProcessGroupGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout = devices(os.getpid()), timeout
            super().__init__(store, rank, size, options)

    @functools.cache
    def devices(pid: int) -> list[Any]:  # of a process: a fork has no such thread
        interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
        make = ProcessGroupGloo.create_device
        return [make(interface=name) if name else ProcessGroupGloo.create_default_device() for name in interfaces]

    distributed_c10d.ProcessGroupGloo = Group


def _import_uncompiled() -> None:
    """Import megatron.core with its small fused functions left as they are.

    It decorates them with torch.compile when it is imported, which loads the compiler for seconds in every process;
    on the CPU the plain forms are used.
    """
    import torch

    compile_ = torch.compile
    torch.compile = lambda function=None, **options: function if function else (lambda inner: inner)
    try:
        import megatron.core  # noqa: F401 - for the decorators that run now
    finally:
        torch.compile = compile_


def _redirect_megatron_rng() -> None:
    """megatron reads torch.cuda.default_generators, which is empty here."""
    import torch
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
