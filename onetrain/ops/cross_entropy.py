"""The loss of a language model, one door to its kernels."""

import math

import torch
import torch.nn.functional as F

IGNORE = -1  # a target with this value is no target (nanoGPT's convention)
UNCHUNKED_BYTES = {'cpu': 2**24, 'cuda': 2**31}  # of fp32 logits up to which the loss is torch's
# on a GPU, where half of these are never written: torch's is faster there and takes less memory
PLAIN_BYTES_COMPILED = 2**34
CHUNK_BYTES = {'cpu': 2**28, 'cuda': 2**29}  # of those of a chunk


def next_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    reduction: str = 'mean',
    chunk: int = 0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of softmax(hidden @ weight^T) against `targets`, in fp32.

    hidden: (..., C); weight: (V, C), the output head; targets: (...) int64, IGNORE where there is
    none. reduction 'mean' (over the targets) or 'sum'. chunk: tokens whose logits are in memory at
    a time, 0: all. z_loss: weight of the squared logarithm of the softmax's denominator, which
    keeps logits from drifting (Chowdhery et al., "PaLM", 2022, section 5); it is in the gradient
    only. Returns a scalar fp32 tensor.
    """
    if chunk:
        dtype = (
            torch.get_autocast_dtype(hidden.device.type)
            if torch.is_autocast_enabled(hidden.device.type)
            else hidden.dtype
        )
        # which the function cannot see under no_grad()
        wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        loss = _ChunkedLoss.apply(
            hidden.flatten(0, -2), weight, targets.flatten(), chunk, dtype, z_loss, wanted
        )
        return loss if reduction == 'sum' else loss / (targets != IGNORE).sum()
    logits, targets = F.linear(hidden, weight).flatten(0, -2).float(), targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)
    if not z_loss:
        return loss
    there = targets != IGNORE
    extra = (
        z_loss
        * torch.where(there, logits.logsumexp(dim=1).square(), 0.0).sum()
        / (1 if reduction == 'sum' else there.sum())
    )
    return loss + (extra - extra.detach())


def choose_chunk(
    asked: int | None,
    tokens: int,
    vocab_size: int,
    device_type: str,
    dtype: torch.dtype,
    compiled: bool = False,
) -> tuple:
    """Return (chunk for next_token_loss, a sentence for the report or None), for micro-steps of
    `tokens` tokens.

    asked: the key loss_chunk; compiled: whether the loss is compiled together with what comes
    before it.
    """
    whole = 4 * tokens * vocab_size
    if dtype == torch.float16:  # the scale of its gradients comes too late for them
        return 0, (
            f'loss_chunk={asked} has no effect: dtype=float16 computes the loss at once'
            if asked
            else None
        )
    if asked is None:
        number = math.ceil(whole / CHUNK_BYTES[device_type])
        asked = (
            max(256, math.ceil(tokens / number / 128) * 128)
            if whole
            > (
                PLAIN_BYTES_COMPILED
                if compiled and device_type == 'cuda'
                else UNCHUNKED_BYTES[device_type]
            )
            else 0
        )
    if not 0 < asked < tokens:
        return min(asked, tokens), None
    return (
        asked,
        (
            f'loss in chunks of {asked} tokens: the logits of a micro-step would take'
            f' {whole / 1e9:.2f} GB'
        ),
    )


def eager_chunk(chunk: int, tokens: int, vocab_size: int, device_type: str, compiled: bool) -> int:
    """Return the chunk with which the loss as it is written takes the memory that it takes with
    `chunk` as it is run.

    Compiled, torch's loss keeps 2 bytes for each logit; as it is written, a chunk takes 8 for each
    of its own.
    """
    large = 4 * tokens * vocab_size > UNCHUNKED_BYTES[device_type]
    return tokens // 4 if compiled and device_type == 'cuda' and not chunk and large else chunk


def _subtract_target(p, target, fused):
    """Return p (N, V) less 1 at each target (N, 1), in place unless `fused`: compiled for a GPU,
    where a comparison joins the kernels around it and a scatter that is to repeat sorts.
    """
    if fused:
        return p - (torch.arange(p.size(1), device=p.device) == target).to(p.dtype)
    return p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))


class _ChunkedLoss(torch.autograd.Function):
    """The sum of the losses, and with it the gradients, chunk by chunk: logits are needed for both
    and computed once.

    hidden: (N, C); weight: (V, C); targets: (N,). dtype: of the matmuls; wanted: whether there are
    to be gradients. As in backward of the plain loss, with p = softmax(logits): d loss / d logits =
    p - onehot(target), to which a z-loss z log(Z)^2 adds 2 z log(Z) p, from which both gradients
    follow; they wait for the gradient of the loss, a factor. The largest p of a token is that of
    its largest logit, 1 / sum(exp(logits - largest)), so that log(Z) = largest - log(largest p).
    """

    @staticmethod
    @torch.autocast('cpu', enabled=False)
    @torch.autocast('cuda', enabled=False)
    def forward(ctx, hidden, weight, targets, chunk, dtype, z_loss, wanted):
        h, w = hidden.to(dtype), weight.to(dtype)
        total = torch.zeros((), device=h.device)
        # every chunk's logits, then p
        room = (
            torch.empty(min(chunk, len(h)), len(w))
            if h.device.type == 'cpu' and dtype == torch.float32
            else None
        )
        fused = torch.compiler.is_compiling() and h.device.type == 'cuda'
        if wanted:
            ctx.gradients = [torch.empty_like(h), None]
        for first in range(0, len(h), chunk):
            here, target = h[first : first + chunk], targets[first : first + chunk, None]
            there, target = target != IGNORE, target.clamp(min=0)
            logits = here @ w.T if room is None else torch.mm(here, w.T, out=room[: len(here)])
            right = logits.gather(1, target).float()
            largest = logits.amax(dim=1, keepdim=True).float()
            p = (
                torch.softmax(logits, dim=1, dtype=torch.float32)
                if room is None
                else torch.softmax(logits, dim=1, out=logits)
            )
            norm = largest - p.amax(dim=1, keepdim=True).log()
            # not in place: torch 2.11 would compile a backward pass of zeros
            total = total + torch.where(there, norm - right, 0.0).sum()
            if wanted:
                slope = _subtract_target(
                    p.mul_(1 + 2 * z_loss * norm) if z_loss else p, target, fused
                ).to(dtype)
                torch.mm(slope, w, out=ctx.gradients[0][first : first + chunk]).mul_(there)
                here = here * there
                if first and dtype == torch.float32:
                    ctx.gradients[1].addmm_(slope.T, here)
                else:  # summed in float32: under FSDP the weight is in bfloat16
                    of_weight = slope.T @ here
                    ctx.gradients[1] = (
                        ctx.gradients[1].add_(of_weight) if first else of_weight.float()
                    )
        if wanted:
            ctx.gradients[1] = ctx.gradients[1].to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx, factor):
        (hidden, weight), ctx.gradients = ctx.gradients, None  # they are used up
        return hidden.mul_(factor), weight.mul_(factor), None, None, None, None, None
