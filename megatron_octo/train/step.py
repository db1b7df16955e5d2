"""One optimizer step: forward and backward of all micro-batches through megatron's schedule, look, clip, update.

Shapes: b sequences of a micro-batch, s tokens of a sequence.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_octo.budget.watch import Finding, WatchState, gravity, is_left_out, judge, remember
from megatron_octo.errors import OctoError
from megatron_octo.train.distributed import bare, mean_loss
from megatron_octo.train.optimizer import gradient_norm, update
from megatron_octo.train.votes import NO_VOTES, Votes

if TYPE_CHECKING:
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_octo.config.train import MidTrainConfig
    from megatron_octo.data.loader import Loader
    from megatron_octo.train.again import RunAgain
    from megatron_octo.train.state import TrainState

LEFT_OUT = Finding(what="its batch is left out", action="skip")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step says of itself, the same on all ranks."""

    loss: float
    """Mean over the step's tokens that count, before the update; 0 if none does."""
    grad_norm: float
    """Global norm before clipping."""
    seconds: float
    """Wall time."""
    watch: WatchState
    """The watch's state after it."""
    votes: Votes = NO_VOTES
    """Of all ranks; none where nothing was computed."""
    finding: Finding | None = None
    """What is wrong with it."""
    note: str = ""
    """What a person should know of it."""

    @property
    def skipped(self) -> bool:
        """Whether the weights are as before."""
        return gravity(self.finding) > 0

    @property
    def is_left_out(self) -> bool:
        """Whether nothing was computed."""
        return self.finding is LEFT_OUT

    @property
    def rolls_back(self) -> bool:
        """Whether the run is to go back to its last save."""
        return self.finding is not None and self.finding.action == "roll_back"


def train_step(
    wrapped: Sequence[Any],
    optimizer: Any,
    loader: Loader,
    *,
    state: TrainState,
    config: MidTrainConfig,
    schedule: Callable[..., list[Any]],
    again: RunAgain,
    votes: Callable[[], Votes],
) -> StepResult:
    """Train on the batch after `state`, unless it is left out. All ranks call it, each with its own `votes`.

    The votes are read once the rank has computed its part: who asks during a step is heard at its end.
    Where `config.watch` acts on the numbers, the weights stay as they are.

    Raises:
        OctoError: it says to stop; on all ranks alike.
    """
    started, step = time.monotonic(), state.step + 1
    if is_left_out(state.watch, step):
        return StepResult(loss=math.nan, grad_norm=math.nan, seconds=0.0, watch=state.watch, finding=LEFT_OUT)

    heard = NO_VOTES

    def compute() -> tuple[float, float]:
        nonlocal heard
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss, heard = forward_backward(wrapped, loader, state.consumed_sequences, config, schedule, votes=votes)
        return loss, gradient_norm(optimizer)

    judged = again.compute(compute, lambda numbers: judge(config.watch, state.watch, *numbers))
    loss, grad_norm = judged.numbers
    skipped = gravity(judged.finding) > 0
    if judged.finding is not None and judged.finding.action == "stop":
        raise OctoError(
            f"step {step:,}: {judged.note}",
            fix="resume from the last save; if it recurs, look at the data of that step, lower learning_rate.peak, or "
            "have it left out (watch.on_*: skip or roll_back)",
        )
    if not skipped:
        update(optimizer, grad_norm, config)
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        seconds=time.monotonic() - started,
        watch=remember(config.watch, state.watch, step, loss, grad_norm, skipped=skipped),
        votes=heard,
        finding=judged.finding,
        note=judged.note,
    )


def forward_backward(
    wrapped: Sequence[Any],
    loader: Loader,
    consumed_sequences: int,
    config: MidTrainConfig,
    schedule: Callable[..., list[Any]],
    *,
    forward_only: bool = False,
    votes: Callable[[], Votes] = Votes,
) -> tuple[float, Votes]:
    """Run the micro-batches of the step after `consumed_sequences`: (their mean loss, the votes of all ranks).

    All ranks call it, each with its own `votes`, by default none.
    """
    batches = [loader.step(consumed_sequences) for _ in wrapped]
    cut, rows = not config.data.across_documents, config.budget.micro_batch_sequences
    parts = schedule(
        forward_step_func=functools.partial(forward_step, cut=cut),
        data_iterator=batches if len(wrapped) > 1 else batches[0],
        model=list(wrapped) if len(wrapped) > 1 else wrapped[0],
        num_microbatches=loader.num_micro_batches,
        seq_length=config.data.seq_length * (rows if cut else 1),  # cut, a micro-batch is one row
        micro_batch_size=1 if cut else rows,
        forward_only=forward_only,
    )
    return mean_loss(parts, loader.device, votes)


def forward_step(
    batches: Iterator[dict[str, torch.Tensor]], model: Any, *, cut: bool = False
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """A forward pass of one chunk, in the form that megatron's schedules call: (output, its loss function).

    Args:
        batches: from a Loader.
        model: the chunk, wrapped.
        cut: whether the batches are cut at documents.
    """
    chunk = bare(model)
    in_the_middle = not (chunk.pre_process or chunk.post_process)  # its input comes from the stage before
    if in_the_middle and not cut:
        return model(None, None, None), loss_sum
    batch = next(batches)
    packing = packed_sequences(batch) if cut else None
    if in_the_middle:
        return model(None, None, None, packed_seq_params=packing), loss_sum
    batch = _context_share(batch, chunk.config)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packing)
    return output, functools.partial(loss_sum, loss_mask=batch["loss_mask"])


def loss_sum(losses: torch.Tensor, *, loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the token losses, tokens, both detached for the log); megatron divides the gradient by all tokens.

    Args:
        losses: [b, s].
        loss_mask: [b, s], 1 where a token counts.
    """
    import torch

    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    return total, tokens.int(), torch.stack([total.detach(), tokens]).double()


def packed_sequences(batch: dict[str, torch.Tensor]) -> PackedSeqParams:
    """The documents' borders as every attention layer takes them; rotary positions are counted from them too."""
    from megatron.core.packed_seq_params import PackedSeqParams

    borders, longest = batch["cu_seqlens"], int(batch["max_seqlen"])
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,  # exact: megatron takes rotary tables as long as the row for positions not counted anew
        max_seqlen_kv=longest,
    )


def _context_share(batch: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """This rank's share of each sequence under context parallelism."""
    if config.context_parallel_size == 1:
        return batch
    from megatron.core import parallel_state as groups
    from megatron.core.utils import get_batch_on_this_cp_rank

    share: dict[str, torch.Tensor] = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=groups.get_context_parallel_group()
    )
    return share
