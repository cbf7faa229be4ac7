"""Vocabulary-parallel linear layer + cross entropy in chunks of rows; the gradients are computed in the forward pass.

Each chunk's logits exist once and are replaced by their gradient, from which the gradients of the rows and of the weight
follow at once.  That is three matrix products in total, no logits are saved for the backward pass, and the memory does not
grow with rows x vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gram_engine.kernels.cross_entropy import cross_entropy_grad_, cross_entropy_stats

LOGITS_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Size of a chunk's logits if no chunk size is given: enough for full speed, and small beside the weight's gradient."""

CACHED_ELEMENTS = 1 << 21
"""Elements of the weight's gradient that stay in a CPU's cache."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    chunk_size: int | None = None,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """Sum over the rows of row_weight * cross entropy of hidden @ weight^T, over the first `vocab_size` rows of the weight.

    Args:
        hidden: [rows, hidden], the same on every process of `group`.
        weight: [padded vocabulary / group size, hidden], this process's rows, hidden's dtype.
        targets: [rows] int64 token ids.
        vocab_size: rows of the whole weight that are real tokens; the rest is padding and gets no probability.
        chunk_size: rows whose logits exist at one time (twice as many with a group, where the communication of one chunk
            overlaps the matrix product of the next one).  None: `default_chunk_size`.
        label_smoothing: weight spread evenly over the vocabulary, as in torch's cross_entropy.
        row_weight: [rows] fp32, or None for ones.
        group: tensor-parallel group, or None for a whole weight.
        main_grad: fp32, shape of `weight`.  The gradient of `weight` is added to it in the forward pass instead of being
            returned through autograd; the gradient of the loss must then be 1 (a plain sum).  None: the gradient goes
            through autograd, if `weight` requires one.

    Returns:
        Scalar fp32 (float64 for float64).  The gradient of `hidden` holds this process's part only: the caller sums it
        over the group.

    Raises:
        RuntimeError: in the backward pass, if main_grad is given and the gradient of the loss is not 1.
    """
    task = _Task(
        targets=targets,
        vocab_size=vocab_size,
        chunk_size=chunk_size or default_chunk_size(weight),
        label_smoothing=label_smoothing,
        row_weight=row_weight,
        group=group if group is not None and dist.get_world_size(group) > 1 else None,
        main_grad=main_grad,
        with_gradients=torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
        with_weight_gradient=main_grad is not None or weight.requires_grad,
    )
    return _LinearCrossEntropy.apply(hidden, weight if main_grad is None else weight.detach(), task)


def default_chunk_size(weight: Tensor) -> int:
    """Number of rows whose logits take LOGITS_BYTES, for a weight [vocabulary, hidden]; a multiple of 128, at least 128."""
    rows = LOGITS_BYTES[weight.device.type] // (len(weight) * weight.element_size())
    return max(rows // 128, 1) * 128


@dataclass
class _Task:
    targets: Tensor
    vocab_size: int
    chunk_size: int
    label_smoothing: float
    row_weight: Tensor | None
    group: dist.ProcessGroup | None
    main_grad: Tensor | None
    with_gradients: bool
    with_weight_gradient: bool


@dataclass
class _Chunk:
    """Logits of some rows while the statistics of all processes are being gathered."""

    rows: slice
    logits: Tensor
    stats: Tensor
    """[processes, rows, 4], valid after `handle`; see cross_entropy_stats."""
    handle: dist.Work | None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, task):
        state = _State(hidden, weight, task)
        pending = deque()
        for number, start in enumerate(range(0, len(hidden), task.chunk_size)):
            pending.append(state.start(number, slice(start, min(start + task.chunk_size, len(hidden)))))
            if len(pending) == len(state.buffers):
                state.finish(pending.popleft())
        for chunk in pending:
            state.finish(chunk)
        ctx.unit_gradient = task.main_grad is not None
        ctx.weight_dtype = weight.dtype
        returned = None if ctx.unit_gradient else state.grad_weight
        ctx.save_for_backward(state.grad_hidden, returned)
        return state.loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.unit_gradient:
            torch._assert_async(grad_loss == 1, "linear_cross_entropy with main_grad needs the gradient of a plain sum")
            return grad_hidden, None, None
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight, None


class _State:
    """Buffers and accumulators of one call."""

    def __init__(self, hidden: Tensor, weight: Tensor, task: _Task):
        self.hidden, self.weight, self.task = hidden, weight, task
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.loss = torch.zeros((), dtype=self.dtype, device=hidden.device)
        self.grad_hidden = self.grad_weight = None
        if task.with_gradients:
            self.grad_hidden = torch.empty_like(hidden)
            self.grad_weight = task.main_grad
            if self.grad_weight is None and task.with_weight_gradient:
                self.grad_weight = torch.zeros_like(weight, dtype=self.dtype)
        processes = 1 if task.group is None else dist.get_world_size(task.group)
        first = 0 if task.group is None else dist.get_rank(task.group) * len(weight)
        self.valid = min(task.vocab_size - first, len(weight))
        local = task.targets - first
        self.targets = torch.where((local >= 0) & (local < len(weight)), local, -1)
        rows = min(task.chunk_size, len(hidden))
        self.buffers = [hidden.new_empty(rows, len(weight)) for _ in range(1 if processes == 1 else 2)]
        self.processes = processes

    def start(self, number: int, rows: slice) -> _Chunk:
        """Compute the logits and start to gather their statistics."""
        logits = self.buffers[number % len(self.buffers)][: rows.stop - rows.start]
        torch.mm(self.hidden[rows], self.weight.t(), out=logits)
        stats = cross_entropy_stats(logits, self.targets[rows], self.valid)
        if self.task.group is None:
            return _Chunk(rows, logits, stats[None], None)
        gathered = stats.new_empty(self.processes * len(stats), stats.shape[1])
        handle = dist.all_gather_into_tensor(gathered, stats, group=self.task.group, async_op=True)
        return _Chunk(rows, logits, gathered.view(self.processes, *stats.shape), handle)

    def finish(self, chunk: _Chunk) -> None:
        """Add the chunk's loss and its gradients."""
        task, rows = self.task, chunk.rows
        if chunk.handle is not None:
            chunk.handle.wait()
        top, exponentials, target, total = chunk.stats.unbind(-1)
        largest = top.amax(dim=0)
        lse = largest + (exponentials * (top - largest).exp()).sum(dim=0).log()
        other_weight = task.label_smoothing / task.vocab_size
        target_weight = 1 - task.label_smoothing
        losses = lse - target_weight * target.sum(dim=0)
        if task.label_smoothing:
            losses -= other_weight * total.sum(dim=0)
        row_weight = None if task.row_weight is None else task.row_weight[rows].to(self.dtype)
        self.loss += (losses if row_weight is None else losses * row_weight).sum()
        if not task.with_gradients:
            return
        grad = chunk.logits
        cross_entropy_grad_(grad, self.targets[rows], lse, self.valid, target_weight, other_weight)
        if row_weight is not None:
            grad *= row_weight[:, None].to(grad.dtype)
        torch.mm(grad, self.weight, out=self.grad_hidden[rows])
        if task.with_weight_gradient:
            _add_product(self.grad_weight, grad, self.hidden[rows])


def _add_product(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """total += grad^T @ rows, in total's dtype."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), rows)
    elif total.is_cuda:
        torch.addmm(total, grad.t(), rows, out_dtype=total.dtype, out=total)
    else:
        # CPUs have no mixed-precision product: each part is rounded once, and computed in pieces that stay in the cache.
        for columns in range(0, len(total), piece := max(CACHED_ELEMENTS // total.shape[1], 1)):
            total[columns : columns + piece] += grad[:, columns : columns + piece].t().contiguous() @ rows
