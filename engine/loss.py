"""The loss of a language model, one door to its kernels."""
import torch
import torch.nn.functional as F

IGNORE = -1  # a target with this value is no target (nanoGPT's convention)
PLAIN_BYTES = {'cpu': 2**28, 'cuda': 2**31}  # of fp32 logits up to which they are kept whole
CHUNK_BYTES = {'cpu': 2**27, 'cuda': 2**29}  # of those of a chunk


def next_token_loss(hidden, weight, targets, reduction='mean', chunk=0):
    """Cross-entropy of softmax(hidden @ weight^T) against `targets`, in fp32.

    hidden: (..., C); weight: (V, C), the output head; targets: (...) int64, IGNORE where there is none.
    reduction 'mean' (over the targets) or 'sum'. chunk: tokens whose logits are in memory at a time, 0: all. Returns a scalar fp32 tensor.
    """
    if 0 < chunk < targets.numel():
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        loss = _ChunkedLoss.apply(hidden.flatten(0, -2), weight, targets.flatten(), chunk, dtype)
        return loss if reduction == 'sum' else loss / (targets != IGNORE).sum()
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction=reduction)


def choose_chunk(asked, tokens, vocab_size, device_type, dtype):
    """(chunk for next_token_loss, a sentence for the report or None), for micro-steps of `tokens` tokens. asked: the key loss_chunk."""
    whole = 4 * tokens * vocab_size
    if dtype == torch.float16:  # the scale of its gradients comes too late for them
        return 0, f'loss_chunk={asked} has no effect: dtype=float16 computes the loss at once' if asked else None
    if asked is None:
        asked = max(128, CHUNK_BYTES[device_type] // (4 * vocab_size) // 128 * 128) if whole > PLAIN_BYTES[device_type] else 0
    if not 0 < asked < tokens:
        return 0, None
    return asked, f'loss in chunks of {asked} tokens: the logits of a micro-step would take {whole / 1e9:.2f} GB'


class _ChunkedLoss(torch.autograd.Function):
    """The sum of the losses, and with it the gradients, chunk by chunk: logits are needed for both and computed once.

    hidden: (N, C); weight: (V, C); targets: (N,). dtype: of the matmuls. As in backward of the plain loss, with p = softmax(logits):
    d loss / d logits = p - onehot(target), from which both gradients follow; they wait for the gradient of the loss, a factor.
    """

    @staticmethod
    @torch.autocast('cpu', enabled=False)
    @torch.autocast('cuda', enabled=False)
    def forward(ctx, hidden, weight, targets, chunk, dtype):
        h, w, wanted = hidden.to(dtype), weight.to(dtype), any(ctx.needs_input_grad)
        total = torch.zeros((), device=h.device)
        if wanted:
            ctx.gradients = [torch.empty_like(h), torch.zeros_like(weight)]
        for first in range(0, len(h), chunk):
            here, target = h[first:first + chunk], targets[first:first + chunk, None]
            there = target != IGNORE
            logits, target = (here @ w.T).float(), target.clamp(min=0)
            norm, right = logits.logsumexp(dim=1, keepdim=True), logits.gather(1, target)
            total += torch.where(there, norm - right, 0.0).sum()
            if wanted:
                slope = logits.sub_(norm).exp_().scatter_(1, target, (right - norm).exp() - 1).mul_(there).to(dtype)
                torch.mm(slope, w, out=ctx.gradients[0][first:first + chunk])
                if weight.dtype == dtype:
                    ctx.gradients[1].addmm_(slope.T, here)
                else:
                    ctx.gradients[1] += slope.T @ here
        return total

    @staticmethod
    def backward(ctx, factor):
        (hidden, weight), ctx.gradients = ctx.gradients, None  # they are used up
        return hidden.mul_(factor), weight.mul_(factor), None, None, None
