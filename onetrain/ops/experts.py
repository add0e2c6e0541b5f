"""Mixture of experts: which experts a token goes to, and the matmuls of all experts at once, with
the plain loop beside them.

Routing is that of DeepSeek-V3 (2024), of which Mixtral, Qwen3-MoE and gpt-oss use a part: an
affinity for each expert, an optional choice of groups, the k best, gates from the affinities.
Experts are balanced without a loss (Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024): a
bias that plays a part in the choice only goes up for experts that got less than their share, and
down for the others.

No token is dropped. `grouped` sorts the (token, expert) pairs by expert and multiplies them in one
call, on H100, H200 and B200 without a word to the host; `loop` takes one expert after another and
is what the former is compared with.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# torch 2.11 has it under another name
_grouped_mm: Any = getattr(F, 'grouped_mm', None) or getattr(torch, '_grouped_mm', None)
# columns behind the counts in what Router gives for a layer: entropy, auxiliary loss, z-loss
STATISTICS = 3


def choose_dispatch(requested: str, widths: tuple, dtype: torch.dtype, device_type: str) -> tuple:
    """Return (dispatch, reason): 'grouped' or 'loop', and why not the requested one, or None.

    widths: inner sizes of the matmuls, whose rows must be multiples of 16 bytes; dtype: torch dtype
    of the matmuls; device_type: 'cpu' | 'cuda'.
    """
    if requested == 'loop':
        return 'loop', None
    if _grouped_mm is None:
        return 'loop', 'this torch has no grouped matmul'
    if device_type == 'cuda' and dtype != torch.bfloat16:
        return (
            'loop',
            f'its matmuls want bfloat16 on a GPU, not {str(dtype).removeprefix("torch.")}',
        )
    multiple = 128 // torch.finfo(dtype).bits
    odd = [width for width in widths if width % multiple]
    if odd:
        return (
            'loop',
            (
                f'its matmuls want widths that are multiples of {multiple} in'
                f' {str(dtype).removeprefix("torch.")}, not {odd[0]}'
            ),
        )
    return 'grouped', None


def syncs_host(device_type: str) -> bool:
    """Return whether torch's grouped matmul copies the counts of tokens to the host on this device:
    it has a kernel for all experts at once on some GPUs only.
    """
    return device_type == 'cuda' and torch.cuda.get_device_capability() not in ((9, 0), (10, 0))


def choose_experts(
    logits: torch.Tensor,
    bias: torch.Tensor,
    *,
    top_k: int,
    score_function: str,
    n_groups: int = 1,
    topk_groups: int = 1,
    norm_topk_prob: bool = True,
    route_scale: float = 1.0,
) -> tuple:
    """Return experts and gates of each token.

    logits: (N, E) fp32; bias: (E,) fp32 added for the choice only, or None; score_function:
    'sigmoid' | 'softmax'. The E experts are n_groups groups of neighbors; only the topk_groups of
    a token whose two best (biased) affinities have the largest sum take part. Returns (experts (N,
    top_k) int64, gates (N, top_k) fp32, scores (N, E) fp32): gates are the affinities of the
    chosen, divided by their sum if norm_topk_prob, times route_scale.
    """
    scores = logits.sigmoid() if score_function == 'sigmoid' else logits.softmax(dim=-1)
    biased = scores.detach() if bias is None else scores.detach() + bias
    if topk_groups < n_groups:
        groups = biased.view(len(biased), n_groups, -1)
        best = (
            groups.topk(min(2, groups.size(-1)), dim=-1)
            .values.sum(dim=-1)
            .topk(topk_groups, dim=-1)
            .indices
        )
        allowed = torch.zeros(groups.shape[:2], dtype=torch.bool, device=groups.device).scatter(
            1, best, True
        )
        biased = groups.masked_fill(~allowed[..., None], float('-inf')).flatten(1)
    experts = biased.topk(top_k, dim=-1).indices
    gates = scores.gather(1, experts)
    if norm_topk_prob:
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be tiny
    return experts, gates * route_scale, scores


def routing_statistics(
    logits: torch.Tensor, scores: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    """Return (E + STATISTICS,) fp32 of one layer and N tokens: how many tokens each expert got; the
    mean entropy of the affinities in nats; the auxiliary loss E * sum_i f_i P_i with f_i an
    expert's share of the choices and P_i its mean share of the affinities, 1 if all are equal
    (Fedus et al., "Switch Transformers", 2021, eq. 4); the z-loss mean(logsumexp(logits)^2) (Zoph
    et al., "ST-MoE", 2022). Gradients flow through the two losses.
    """
    counts = torch.zeros(scores.size(-1), device=scores.device).scatter_add(
        0, experts.flatten(), torch.ones(experts.numel(), device=scores.device)
    )
    shares = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    entropy = -(shares * shares.clamp(min=1e-20).log()).sum(dim=-1).mean().detach()
    auxiliary = scores.size(-1) * (counts / experts.numel() * shares.mean(dim=0)).sum()
    return torch.cat(
        [counts, torch.stack([entropy, auxiliary, logits.logsumexp(dim=-1).square().mean()])]
    )


def run_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    gates: torch.Tensor,
    fc: tuple,
    proj: tuple,
    activate: Callable,
    dispatch: str,
) -> torch.Tensor:
    """Sum over a token's experts of gate * (activate(x fc_e^T + b_e) proj_e^T + c_e).

    x: (N, C); experts, gates: (N, k); fc, proj: (weight (E, out, in), bias (E, out) or None);
    activate: from the width of fc to that of proj. dispatch: 'grouped' | 'loop'. Returns (N, C) in
    the dtype of the matmuls, which under autocast is autocast's.
    """
    if torch.is_autocast_enabled(x.device.type):  # which does not know the grouped matmul
        low = torch.get_autocast_dtype(x.device.type)
        x = x.to(low)
        fc, proj = (tuple(p if p is None else p.to(low) for p in pair) for pair in (fc, proj))
    return _DISPATCH[dispatch](x, experts, gates.to(x.dtype), fc, proj, activate)


def _loop(x, experts, gates, fc, proj, activate):
    out = torch.zeros_like(x)
    for e in range(len(fc[0])):
        token, place = torch.where(experts == e)
        h = activate(F.linear(x[token], fc[0][e], None if fc[1] is None else fc[1][e]))
        h = F.linear(h, proj[0][e], None if proj[1] is None else proj[1][e])
        out = out.index_add(0, token, h * gates[token, place, None])
    return out


def _grouped(x, experts, gates, fc, proj, activate):
    n, k = experts.shape
    # pair i of the sorted belongs to token order[i] // k
    owners, order = experts.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(n * k, device=order.device))
    ends = torch.searchsorted(
        owners, torch.arange(len(fc[0]), device=owners.device), right=True
    ).to(torch.int32)
    h = _linear(
        activate(_linear(_Permute.apply(x, order, inverse, k), fc, owners, ends)),
        proj,
        owners,
        ends,
    )
    return (_Unpermute.apply(h, order, inverse).view(n, k, -1) * gates[..., None]).sum(dim=1)


def _linear(x, weight_and_bias, owners, ends):
    weight, bias = weight_and_bias
    out = grouped_mm(x, weight, ends)
    return out if bias is None else out + F.embedding(owners, bias)


# an operator of its own, since torch's cannot be traced by the compiler in all the dtypes that it
# computes (fp32 on a CPU)
@torch.library.custom_op('onetrain::grouped_mm', mutates_args=())
def grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return rows ends[e - 1] to ends[e] of x (M, in) times weight[e]^T, weight (E, out, in), ends
    (E,) int32: (M, out).
    """
    return _grouped_mm(x, weight.transpose(-2, -1), offs=ends)


@torch.library.custom_op('onetrain::grouped_mm_backward', mutates_args=())
def _grouped_mm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad = grad.contiguous()
    return _grouped_mm(grad, weight, offs=ends), _zero_without_tokens(
        _grouped_mm(grad.t(), x, offs=ends), ends
    )


def _zero_without_tokens(of_weight, ends):
    """Return the gradient (E, out, in) with zeros for experts that got no token: torch's kernel for
    B200 leaves these unwritten (pytorch issue 172439).
    """
    some = ends.diff(prepend=ends.new_zeros(1)) > 0
    return torch.where(some[:, None, None], of_weight, 0)


grouped_mm.register_fake(lambda x, weight, ends: x.new_empty(x.size(0), weight.size(1)))
_grouped_mm_backward.register_fake(
    lambda grad, x, weight, ends: (torch.empty_like(x), torch.empty_like(weight))
)
grouped_mm.register_autograd(
    lambda ctx, grad: (*_grouped_mm_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class _Permute(torch.autograd.Function):
    """Rows of x (N, C) in the order of the sorted pairs: (N * k, C). That the order is a
    permutation spares backward the atomic additions of indexing.
    """

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return (
            grad.index_select(0, inverse).view(-1, ctx.k, grad.size(-1)).sum(dim=1),
            None,
            None,
            None,
        )


class _Unpermute(torch.autograd.Function):
    """Rows of sorted pairs back in the order of tokens."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order)
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


_DISPATCH = {'grouped': _grouped, 'loop': _loop}


def update_balance(
    biases: list[torch.Tensor], counts: torch.Tensor, rate: float, applied: int | torch.Tensor
) -> None:
    """Move each layer's (E,) fp32 balancing bias, in place, by `rate` toward experts with fewer
    than the mean of its row of the (L, E) counts of a step and away from those with more. applied:
    scalar tensor, 0 for a step that was skipped.
    """
    for bias, move in zip(
        biases, rate * applied * (counts.mean(dim=-1, keepdim=True) - counts).sign()
    ):
        bias += move


def load_score(counts: torch.Tensor) -> torch.Tensor:
    """Return 100 * least / most of the (..., E) counts: 100 if all experts got as many tokens."""
    return 100 * counts.amin(dim=-1) / counts.amax(dim=-1).clamp(min=1)


def routing_report(
    routing: torch.Tensor,
    layers: nn.Module,
    biases: list[torch.Tensor],
    tokens: int,
    top_k: int,
    shares: bool = True,
) -> dict:
    """Return the `moe` object of the log.

    routing: (L, E + STATISTICS) on the CPU, sums over the `tokens` tokens of a step as
    routing_statistics() orders them; layers: their numbers in the model; biases: their balancing
    biases; top_k: experts of a token; shares: whether to list the share of each expert, beside the
    least and the most, which are most of a log where experts are many.
    """
    counts = routing[:, :-STATISTICS]
    entropy, auxiliary, z = (routing[:, -STATISTICS:] / tokens).unbind(1)
    rows = []
    for i, (layer, bias, row) in enumerate(zip(layers, biases, counts)):
        share = row / row.sum()
        rows.append(
            {
                'layer': layer,
                **({'utilization': _rounded(share)} if shares else {}),
                'least': _rounded(share.min()),
                'most': _rounded(share.max()),
                'load_score': _rounded(load_score(row)),
                'bias_min': _rounded(bias.min()),
                'bias_max': _rounded(bias.max()),
                'entropy': _rounded(entropy[i]),
                'dropped': tokens * top_k - int(row.sum()),
            }
        )
    return {
        'load_score': load_score(counts).mean().item(),
        'aux_loss': auxiliary.mean().item(),
        'z_loss': z.mean().item(),
        'layers': rows,
    }


def _rounded(tensor):
    """Return the numbers of a tensor to five digits behind the point."""
    return (
        [round(number, 5) for number in tensor.tolist()]
        if tensor.dim()
        else round(tensor.item(), 5)
    )
