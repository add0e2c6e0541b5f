"""The loss of a language model, one door to its kernels."""
import torch.nn.functional as F

IGNORE = -1  # a target with this value is no target (nanoGPT's convention)


def next_token_loss(hidden, weight, targets, reduction='mean'):
    """Cross-entropy of softmax(hidden @ weight^T) against `targets`, in fp32.

    hidden: (..., C); weight: (V, C), the output head; targets: (...) int64, IGNORE where there is none.
    reduction 'mean' (over the targets) or 'sum'. Returns a scalar fp32 tensor.
    """
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction=reduction)
