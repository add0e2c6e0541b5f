"""Context parallelism: exact causal attention over sequences that are split over several ranks (Liu
et al., "Ring Attention", 2023).

A sequence is cut into 2k chunks, and rank r of k holds chunks r and 2k - 1 - r (zig-zag), so that
causality leaves the same work to all:

    k = 2    rank 0: chunks 0, 3    rank 1: chunks 1, 2

Keys and values travel round the ring. In step s rank r sees those of rank j = r - s (mod k): of its
own it needs the causal part; of an earlier rank (j < r) the first chunk, for all its queries; of a
later one (j > r) both chunks, for its second half of queries. Partial results are merged by their
log-sum-exp (online softmax). In backward the gradients of keys and values travel along and come
home with the last step.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from onetrain.ops import flash_lse
from onetrain.ops.cross_entropy import IGNORE

if TYPE_CHECKING:
    from onetrain.data.dataset import Mixture, Tokens


class Ring:
    """The ranks that share each sequence: this is `rank` of `size` in process group `group`.

    A block_size that is no multiple of 2 * size is filled up at the end; what is there is seen by
    no real token and has no target.
    """

    def __init__(self, group: dict, rank: int, size: int, block_size: int, device: torch.device):
        self.group, self.rank, self.size = group, rank, size
        self.attend = _RingAttention.apply
        chunk = -(-block_size // (2 * size))
        self.chunks = [(c * chunk, (c + 1) * chunk) for c in (rank, 2 * size - 1 - rank)]
        self.block_size = block_size
        positions = torch.cat([torch.arange(begin, end) for begin, end in self.chunks])
        # global position of each local token
        self.positions = positions.clamp(max=block_size - 1).to(device)

    def read_part(self, file: 'Mixture | Tokens', starts: np.ndarray):
        """Read this rank's tokens of the sequences that begin at `starts`, (B,) array: (2, B,
        local) int64, inputs and targets.

        file: dataset.Tokens or Mixture. Nothing that other ranks of the ring hold is read.
        """
        x, y = [], []
        for begin, end in self.chunks:
            end, beyond = min(end, self.block_size), max(0, end - max(begin, self.block_size))
            if begin < end:
                window = file.windows(starts + begin, end - begin)
                x, y = [*x, window[:, :-1]], [*y, window[:, 1:]]
            if beyond:  # filled up with the last token
                last = file.windows(starts + self.block_size - 1, 0).expand(-1, beyond)
                x, y = [*x, last], [*y, torch.full_like(last, IGNORE)]
        return torch.stack([torch.cat(x, dim=1), torch.cat(y, dim=1)])

    def keep_from_compiler(self):
        """Let torch.compile leave sends and receives alone. Called when there is something to
        compile, since this alone imports the compiler (a second).
        """
        self.attend = torch.compiler.disable(self.attend)

    def send_on(self, tensor: torch.Tensor):
        """Start sending `tensor` to the next rank and receiving one like it from the rank before;
        returns a function that waits for it.
        """
        received = torch.empty_like(tensor)
        following, before = (
            dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1)
        )
        requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, following, self.group),
                dist.P2POp(dist.irecv, received, before, self.group),
            ]
        )

        def wait():
            for request in requests:
                request.wait()
            return received

        return wait


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring: 'Ring | None',
    kernel: str | None = None,
):
    """Return causal attention over the whole sequence, scaled by 1/sqrt(head_dim), of which each
    rank of `ring` holds the tokens of Ring.read_part().

    q: (B, n_head, t, head_dim); k, v: (B, n_kv, t, head_dim) with n_head a multiple of n_kv; t = 2
    * chunk local tokens. Returns (B, n_head, t, head_dim) in q's dtype. kernel: 'flash' | 'manual'
    | None (flash where the device has it for this dtype). Every rank must call it, also for the
    backward pass.
    """
    return ring.attend(q, k, v, ring, kernel or flash_lse.choose_kernel(q))


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ring, kernel):
        kv, out, lse = torch.stack([k, v]), None, None
        for step in range(ring.size):
            wait = ring.send_on(kv) if step < ring.size - 1 else None
            queries, keys, causal = _seen(step, ring, q.size(2))
            part, part_lse = flash_lse.forward(
                kernel, q[:, :, queries], *_expand(kv[:, :, :, keys], q.size(1)), causal
            )
            if step == 0:
                out, lse = part.to(torch.float32, copy=True), part_lse.clone()
            else:
                both = torch.logaddexp(lse[:, :, queries], part_lse)
                out[:, :, queries] = (
                    out[:, :, queries] * (lse[:, :, queries] - both).exp()[..., None]
                    + part.float() * (part_lse - both).exp()[..., None]
                )
                lse[:, :, queries] = both
            kv = wait() if wait else None
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.kernel = ring, kernel
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        ring, kv = ctx.ring, torch.stack([k, v])
        dq, arriving = torch.zeros(q.shape, dtype=torch.float32, device=q.device), None
        for step in range(ring.size):
            wait = ring.send_on(kv) if step < ring.size - 1 else None
            queries, keys, causal = _seen(step, ring, q.size(2))
            seen = kv[:, :, :, keys]
            part_dq, part_dk, part_dv = flash_lse.backward(
                ctx.kernel,
                grad[:, :, queries],
                q[:, :, queries],
                *_expand(seen, q.size(1)),
                out[:, :, queries],
                lse[:, :, queries],
                causal,
            )
            dq[:, :, queries] += part_dq.float()
            # a shared key or value gets the sum over the queries' heads that share it
            part_dkv = torch.stack(
                [part.float().unflatten(1, (k.size(1), -1)).sum(2) for part in (part_dk, part_dv)]
            )
            dkv = (
                arriving()
                if arriving
                else torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
            )
            dkv[:, :, :, keys] += part_dkv
            arriving = ring.send_on(dkv)
            kv = wait() if wait else None
        dk, dv = arriving().to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None


def _seen(step, ring, t):
    """Return (slice of the local queries, slice of the keys at hand, whether causality matters) in
    this step of the ring.
    """
    everything = slice(0, t)
    if step == 0:
        return everything, everything, True
    if step <= ring.rank:  # keys of an earlier rank
        return everything, slice(0, t // 2), False
    return slice(t // 2, t), everything, False


def _expand(kv, n_head):
    """k and v of stacked (2, B, n_kv, t, head_dim), each repeated to (B, n_head, t, head_dim)."""
    return kv.repeat_interleave(n_head // kv.size(2), dim=2) if kv.size(2) != n_head else kv
