"""The loss: cross-entropy at labelled positions only, so that most of [tokens, vocabulary] is never computed.

T tokens of S samples in a packed row, n labelled positions, C channels, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visualrwkv.text.prompt import IGNORE

ROWS, TILE = 1024, 64
"""Rows of logits whose gradients are held at a time (1,024 × 65,536 bf16 are 134 MB), and rows of a softmax: 17 MB of
fp32, which stay in the cache between its passes."""

SMALL, BLOCK = 1 << 24, 2048
"""Entries of a head whose gradient may be summed in fp32 beside it (64 MB); rows of a larger one that are taken at a time."""


def shift_labels(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each position's next label (T,): the last position of a sample has none."""
    targets = torch.full_like(labels, IGNORE)
    targets[:-1] = labels[1:]
    targets[cu_seqlens[1:] - 1] = IGNORE
    return targets


def sample_weights(targets: Tensor, cu_seqlens: Tensor) -> Tensor:
    """1 / (labelled positions of the sample) at each labelled position, else 0: their sum is the number of samples."""
    valid = (targets != IGNORE).float()
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    sample = torch.repeat_interleave(torch.arange(len(lengths), device=targets.device), lengths)
    counts = torch.zeros(len(lengths), device=targets.device).index_add(0, sample, valid)
    return valid / counts.clamp(min=1)[sample]


def distinct_rows(head: Tensor, answers: set[int]) -> Tensor | None:
    """The rows of the head (V, C) that differ from row 0 or that an answer needs, rising, and row 0 for all others.

    Rows that begin equal and are never an answer get equal gradients, so they stay equal while they are trained: one of
    them speaks for all, and only these few are trained (`Objective`). In a model trained from nothing most rows are
    such; in a public one few are, then None.
    """
    distinct = (head.detach() - head.detach()[0]).abs().amax(-1) > 1e-6
    distinct[list(answers)] = True
    distinct[0] = False
    if int(distinct.sum()) > 0.9 * len(head):
        return None
    return torch.cat([distinct.nonzero()[:, 0], torch.zeros(1, dtype=torch.int64, device=head.device)])


@torch.no_grad()
def wake_head(head: Tensor, answers: set[int]) -> None:
    """Give a new model's head, which is zero, random rows where answers need them; the others stay equal and cheap."""
    if not bool(head.any()):
        rows = torch.tensor(sorted(answers), device=head.device)
        head[rows] = (
            torch.randn(len(rows), head.shape[1], device=head.device, dtype=head.dtype) * 0.5 * head.shape[1] ** -0.5
        )


class BlockedCrossEntropy(torch.autograd.Function):
    """As `LinearCrossEntropy`, for a large head: block by block of its rows, once for the softmax and once for the gradients.

    A third more products, and beside the gradients themselves never more than a block: of 8,192 positions and a head of
    65,536 × 2,048 in bf16 less than 300 MB. hidden (n, C), head (V, C), targets (n,), weights (n,).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        h, count = hidden.to(dtype), len(hidden)
        top = hidden.new_full((count,), -math.inf, dtype=torch.float32)
        total, at_target = torch.zeros_like(top), torch.zeros_like(top)
        for first in range(0, len(head), BLOCK):
            logits = (h @ head[first : first + BLOCK].to(dtype).T).float()
            higher = torch.maximum(top, logits.amax(-1))
            inside = (targets >= first) & (targets < first + BLOCK)
            place = (targets - first).clamp(0, logits.shape[1] - 1)
            at_target = torch.where(inside, logits.gather(1, place[:, None])[:, 0], at_target)
            total = total * (top - higher).exp() + logits.sub_(higher[:, None]).exp_().sum(-1)
            top = higher
            del logits  # before the next block's
        norm = top + total.log()
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needs_hidden else None
        d_head = torch.empty_like(head) if needs_head else None
        for first in range(0, len(head), BLOCK) if needs_hidden or needs_head else ():
            part = slice(first, min(first + BLOCK, len(head)))
            W = head[part].to(dtype)
            probs = (h @ W.T).float().sub_(norm[:, None]).exp_().mul_(weights[:, None])
            mine = ((targets >= part.start) & (targets < part.stop)).nonzero()[:, 0]
            probs[mine, targets[mine] - part.start] -= weights[mine]
            slope = probs.to(dtype)
            del probs
            if d_hidden is not None:
                d_hidden += slope @ W
            if d_head is not None:
                d_head[part] = slope.T @ h
            del slope
        ctx.save_for_backward(None if d_hidden is None else d_hidden.to(hidden.dtype), d_head)
        return (weights * (norm - at_target)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_head = (None if d is None else d.mul_(slope) for d in ctx.saved_tensors)
        return d_hidden, d_head, None, None


L2WRAP = 1e-4
"""How strongly the reference holds the largest logits down."""


def packed_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None = None,
    alike: int = 1,
    l2wrap: bool = False,
) -> Tensor:
    """Sum over samples of each sample's mean cross-entropy; divide by the number of samples for the reference's loss.

    hidden (T, C), head (V, C), labels (T,) with −100 where nothing is learned, cu_seqlens (S+1,). With rows (R,), the
    whole head's `distinct_rows`, `head` holds these alone (R, C); the last stands for `alike` rows and gets the gradient
    of one of them. l2wrap: with the reference's extra gradient on each position's largest logit (`L2Wrap`).
    """
    targets = shift_labels(labels, cu_seqlens)
    weights = sample_weights(targets, cu_seqlens)
    places = (targets != IGNORE).nonzero()[:, 0]
    targets, weights = targets[places], weights[places]
    if rows is not None:
        targets = torch.searchsorted(rows[:-1], targets)
    if alike == 1 and head.numel() > SMALL:
        loss = BlockedCrossEntropy.apply(hidden[places], head, targets, weights)
    else:
        loss = LinearCrossEntropy.apply(hidden[places], head, targets, weights, alike)
    if l2wrap:
        assert rows is None, "the largest logit is one of the whole head's"
        loss = L2Wrap.apply(loss, hidden, head, L2WRAP * (len(cu_seqlens) - 1) / len(labels))
    return loss


class L2Wrap(torch.autograd.Function):
    """RWKV-LM's L2Wrap: the loss as it is, and to the gradient of every position's largest logit m, labelled or not, is
    added factor · m. With factor 1e-4 · S / T it is the reference's 1e-4 / (B · T) in the mean over samples.

    loss (), hidden (T, C), head (V, C).
    """

    @staticmethod
    def forward(ctx, loss: Tensor, hidden: Tensor, head: Tensor, factor: float) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        h, W = hidden.to(dtype), head.to(dtype)
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(head) if ctx.needs_input_grad[2] else None
        for start in range(0, len(h), TILE):
            part = slice(start, start + TILE)
            top, entry = (h[part] @ W.T).max(-1)
            slope = factor * top.float()[:, None]
            d_hidden[part] = slope * head[entry]
            if d_head is not None:
                d_head.index_add_(0, entry, (slope * hidden[part]).to(head.dtype))
        ctx.save_for_backward(d_hidden, d_head)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        d_hidden, d_head = ctx.saved_tensors
        return slope, d_hidden * slope, None if d_head is None else d_head * slope, None


class LinearCrossEntropy(torch.autograd.Function):
    """Σ weight · cross-entropy(hidden · headᵀ, target), its gradients made in the same pass over tiles of rows.

    hidden (n, C), head (R, C), targets (n,), weights (n,); the last row of the head stands for `alike` equal ones. Under
    autocast the products are in its dtype.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, alike: int) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        h, W = hidden.to(dtype), head.to(dtype)
        d_hidden = torch.empty_like(h)
        d_head = torch.zeros(W.shape, dtype=torch.float32, device=W.device) if ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        slopes = torch.empty(min(ROWS, len(h)), len(W), dtype=dtype, device=W.device)
        for start in range(0, len(h), ROWS):
            block = range(start, min(start + ROWS, len(h)))
            for first in block[::TILE]:
                part = slice(first, min(first + TILE, block.stop))
                logits = (h[part] @ W.T).float()  # fp32: a softmax over 65,536 entries
                logits[:, -1] += math.log(alike)
                picked, scale = targets[part, None], weights[part, None]
                top = logits.amax(-1, keepdim=True)
                at_target = logits.gather(1, picked)
                probs = logits.sub_(top).exp_()
                total = probs.sum(-1, keepdim=True)
                loss += (scale * (top + total.log() - at_target)).sum()
                slopes[first - start : part.stop - start] = probs.mul_(scale / total).scatter_add_(1, picked, -scale)
            slope, part = slopes[: len(block)], slice(start, block.stop)
            d_hidden[part] = slope @ W
            if d_head is not None:
                d_head += slope.T @ h[part]
        if d_head is not None:
            d_head[-1] /= alike
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_head if d_head is None else d_head.to(head.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * slope, None if d_head is None else d_head * slope, None, None, None
