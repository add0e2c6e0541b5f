"""Keys and values of the tokens that a model has read, so that the next token costs one token's
work.
"""

from collections.abc import Sequence

import torch

from onetrain.ops.attention import FULL_ATTENTION


class Cache:
    """Room for the keys and values of up to `size` tokens of each row, layer by layer; a layer with
    a window keeps no more than it looks back on.

    windows: of each layer, None for everything (ModelConfig.windows); n_kv, head_dim: of a layer's
    keys; padding: (batch,) int64, how many tokens at the left of each row are no text, or None.
    static: keep shapes and addresses from token to token, as compiled decoding and CUDA graphs
    need: attention then goes over all `size` places, and windows save no room.

    Model.forward() calls begin(), each layer extend(), then end(). `length` counts the places
    taken, padding included; of a static one, `at` does.
    """

    def __init__(
        self,
        windows: list,
        batch: int,
        n_kv: int,
        head_dim: int,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
        padding: torch.Tensor | None = None,
        static: bool = False,
    ):
        self.windows = windows
        self.size = size
        self.padding = padding
        self.static = static
        self.length = 0
        room = [
            size if window is None or static else min(max(window - 1, 1), size)
            for window in windows
        ]
        self.keys, self.values = (
            [torch.zeros(batch, n_kv, n, head_dim, device=device, dtype=dtype) for n in room]
            for _ in range(2)
        )
        self.device = device
        # `length`, for a graph that is replayed
        self.at = torch.zeros((), dtype=torch.int64, device=device)
        if static:
            for tensor in (self.at, *self.keys, *self.values):
                # or no CUDA graph is made of what writes to it
                torch._dynamo.mark_static_address(tensor)

    def begin(self, T: int):
        """Make the masks for T more tokens, {window: mask of attention}; returns their
        positions: a slice, or (B or 1, T) int64.
        """
        self.new = T
        if T == 1 and self.padding is None and not self.static:
            # a layer keeps no more than its window
            self.masks = dict.fromkeys(self.windows, FULL_ATTENTION)
            return slice(self.length, self.length + 1)
        if self.static:
            queries = self.at + torch.arange(T, device=self.device)
            seen = torch.arange(self.size, device=self.device)
        else:
            queries = torch.arange(self.length, self.length + T, device=self.device)
        self.masks, self.queries = {}, queries
        for window in set(self.windows):
            if (
                not self.static
                and self.length == 0
                and self.padding is None
                and (window is None or window >= T)
            ):
                self.masks[window] = None  # plain causality
                continue
            places = (
                seen
                if self.static
                else torch.arange(self._first(window), self.length + T, device=self.device)
            )
            mask = (queries[:, None] >= places)[None, None]
            if window is not None:
                mask = mask & (queries[:, None] - places < window)
            if self.padding is not None:  # what is no text sees itself alone
                mask = mask & (places >= self.padding[:, None])[:, None, None] | (
                    queries[:, None] == places
                )
            self.masks[window] = mask
        if self.padding is not None:
            return (queries - self.padding[:, None]).clamp(min=0)
        return queries[None] if self.static else slice(self.length, self.length + T)

    def _first(self, window):
        """Return the oldest place before the new ones that a layer with this window looks back
        on.
        """
        return 0 if window is None else max(0, self.length - window + 1)

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Sequence[torch.Tensor]:
        """Take up (B, n_kv, T, head_dim) keys and values; returns those that the T queries may look
        at, this layer's mask says which.
        """
        keys, values, window = self.keys[layer], self.values[layer], self.windows[layer]
        if self.static:
            return keys.index_copy_(2, self.queries, k.to(keys.dtype)), values.index_copy_(
                2, self.queries, v.to(values.dtype)
            )
        if window is None:
            end = self.length + self.new
            keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
            return keys[:, :, :end], values[:, :, :end]
        kept = self.length - self._first(window)
        both = [
            torch.cat([old[:, :, :kept], new.to(old.dtype)], dim=2)
            for old, new in ((keys, k), (values, v))
        ]
        for old, together in zip((keys, values), both):
            last = together[:, :, -old.size(2) :]
            old[:, :, : last.size(2)] = last
        return both

    def end(self, T: int) -> None:
        """Count T more tokens as read, by all layers."""
        if self.static:
            self.at += T  # a number of Python's would be compiled in, and each token compiled anew
        else:
            self.length += T
