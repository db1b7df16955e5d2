"""OpenRLHF 0.11 and vLLM's CPU build, patched module by module as each is imported.

Each function below mends one module, named in BEFORE (run just before the module's own code) or
AFTER (just after). What is patched is what only a GPU has: device calls, PyNccl, flash attention;
and one property of vLLM's CPU build: it packs weights away at load, so that weights sent later are lost.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

FLASH_ATTENTION_STUBS = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")


class CpuDevice(str):
    """`"cpu"` where a device is wanted, and index 0 in `f"cuda:{device}"`."""

    def __format__(self, spec: str) -> str:
        return "0"


def _replace(owner: Any, name: str, value: Any) -> None:
    """Set an attribute that must be there already: another version may have renamed it, and would not be patched."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner!r} has no {name} to patch: its version is not the one in requirements/cpu.txt")
    setattr(owner, name, value)


def _cuda_calls(_: Any) -> None:
    """The torch.cuda calls on OpenRLHF's text path do nothing, and the current device is the CPU."""
    import torch

    if torch.cuda.is_available():
        raise RuntimeError("the CPU patches of OpenRLHF are on PYTHONPATH of a process that has a GPU")
    torch.cuda.current_device = lambda: CpuDevice("cpu")
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.current_stream = lambda device=None: None


def _bf16_products(_: Any) -> None:
    """OpenRLHF trains in bf16, which not every CPU can multiply."""
    from megatron_octo.platform import bf16_matmul

    bf16_matmul.install()


def _flash_attention_in(_: Any) -> None:
    """ring_attn_utils imports four functions of flash_attn, which packing uses: transformers' own do the same."""
    import torch
    from einops import rearrange
    from transformers import modeling_flash_attention_utils as padding

    def all_gather(tensor: Any, group: Any) -> Any:
        raise NotImplementedError("ring attention needs flash-attn")

    modules = {name: types.ModuleType(name) for name in FLASH_ATTENTION_STUBS}
    modules["flash_attn"].__path__ = []
    modules["flash_attn.utils"].__path__ = []
    bert_padding: Any = modules["flash_attn.bert_padding"]
    bert_padding.index_first_axis = lambda rows, indices: torch.index_select(rows, 0, indices)
    bert_padding.pad_input = padding._pad_input
    bert_padding.unpad_input = padding._unpad_input
    bert_padding.rearrange = rearrange
    distributed: Any = modules["flash_attn.utils.distributed"]
    distributed.all_gather = all_gather
    sys.modules.update(modules)


def _flash_attention_out(_: Any) -> None:
    """Nobody else may take the stub for an installed flash-attn."""
    for name in FLASH_ATTENTION_STUBS:
        sys.modules.pop(name, None)


def _sdpa(module: Any) -> None:
    """OpenRLHF forces flash attention when samples are packed; sdpa masks packed samples by position_ids too."""
    init = module.Actor.__init__

    def with_sdpa(self: Any, pretrain: Any, attn_implementation: str = "sdpa", **kwargs: Any) -> None:
        init(
            self,
            pretrain,
            attn_implementation="sdpa" if "flash" in attn_implementation else attn_implementation,
            **kwargs,
        )

    module.Actor.__init__ = with_sdpa


def _device_mesh(module: Any) -> None:
    init = module.init_device_mesh
    module.init_device_mesh = lambda device, *args, **kwargs: init("cpu", *args, **kwargs)


class GlooGroup:
    """Stands for vLLM's PyNcclCommunicator between the trainer (rank 0) and the vLLM workers."""

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        from vllm.distributed.utils import stateless_init_torch_distributed_process_group

        self.group = stateless_init_torch_distributed_process_group(host, port, rank, world_size, "gloo")

    def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
        """All ranks of the group: `tensor` of rank `src` into theirs."""
        import torch.distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self.group.broadcast([tensor.detach().contiguous() if tensor.requires_grad else tensor], options).wait()


def _weight_group(module: Any) -> None:
    """PyNccl without a GPU disables itself without a word, and vLLM would keep its first weights."""

    def stateless_init_process_group(host: str, port: int, rank: int, world_size: int, device: Any) -> GlooGroup:
        return GlooGroup(host, port, rank, world_size)

    _replace(module, "stateless_init_process_group", stateless_init_process_group)


def _receive_weight(module: Any) -> None:
    def update_weight(self: Any, name: str, dtype: Any, shape: Any, empty_cache: bool = False) -> None:
        import torch

        if dtype != self.model_config.dtype:
            raise TypeError(f"weight {name} is {dtype}, vLLM's model is {self.model_config.dtype}")
        weight = torch.empty(shape, dtype=dtype)  # upstream: on "cuda"
        self._model_update_group.broadcast(weight, src=0)
        self.model_runner.model.load_weights(weights=[(name, weight)])

    _replace(module.WorkerWrap, "update_weight", update_weight)


def _live_linear(module: Any) -> None:
    """vLLM's CPU build packs each linear weight at load and drops the parameter: a later load fails, or, for
    lm_head, is ignored without a word. Compute from the live parameter instead."""
    import torch

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    _replace(module, "dispatch_cpu_unquantized_gemm", dispatch)


def _fork_engine(module: Any) -> None:
    """vLLM starts its engine afresh inside Ray, since CUDA does not survive a fork. Without CUDA a fork is safe, and
    spares a second import of the whole stack: 10 s and 0.7 GB."""
    _replace(module, "_maybe_force_spawn", lambda: None)


BEFORE: dict[str, Callable[[Any], None]] = {
    "openrlhf": _cuda_calls,
    "openrlhf.models.ring_attn_utils": _flash_attention_in,
}
AFTER: dict[str, Callable[[Any], None]] = {
    "openrlhf": _bf16_products,
    "openrlhf.models.actor": _sdpa,
    "openrlhf.models.ring_attn_utils": _flash_attention_out,
    "openrlhf.trainer.ray.vllm_worker_wrap": _receive_weight,
    "openrlhf.utils.deepspeed.deepspeed": _device_mesh,
    "openrlhf.utils.distributed_util": _weight_group,
    "vllm.model_executor.layers.utils": _live_linear,
    "vllm.utils.system_utils": _fork_engine,
}


class _PatchingLoader(importlib.abc.Loader):
    """Runs a module's patches around its own code; all else is its own loader's."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        if name in BEFORE:
            BEFORE[name](module)
        self.loader.exec_module(module)
        if name in AFTER:
            AFTER[name](module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class _PatchingFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name not in BEFORE and name not in AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


def install() -> None:
    """Arrange for the patches; nothing is imported now."""
    if not any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchingFinder())
