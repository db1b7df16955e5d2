"""Lets megatron save the optimizer of a model under torch's FSDP: it matches states to weights by identity.

torch's `DTensor.to_local` makes a new object of a parameter's local part at each call; megatron expects the same one.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Give megatron's matching the local part itself. A second call changes nothing."""
    from megatron.core.dist_checkpointing import optimizer

    optimizer.to_local_if_dtensor = local_part


def local_part(tensor: Any) -> Any:
    """This rank's rows of a tensor under FSDP; any other tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
