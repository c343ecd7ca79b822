"""Attention by plain operations, a block of queries at a time.

The fused kernels have neither forward-mode nor second derivatives. Plain operations have, but form the weights of every query
with every key, and pass over them in memory several times: 54 MB a layer for the 1500 places of a Whisper tiny's encoder. Taken
in blocks that fit a cache, a JVP at the log-mel features of that Whisper, the derivative of a recorded backward pass, takes
0.53 s instead of 0.72 s, where a VJP through fused attention takes 0.40 s (a Zen 4, 2 threads).
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Bytes of the weights of a block. For the Whisper above, a JVP takes 0.63 s at 1 MiB, 0.58 at 4, 0.53 at 8, 0.62 at 24.
BLOCK = 1 << 23
QUERIES = 64  # in a block at least, so that reading the keys anew for each costs nothing


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Computes attention by plain operations inside; on a CPU in blocks, where the weights of all queries do not fit a cache.

    That holds for what goes through `torch.nn.functional.scaled_dot_product_attention`, as `nn.MultiheadAttention` does too.
    """
    fast, whole = torch.backends.mha.get_fastpath_enabled(), F.scaled_dot_product_attention
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = _in_blocks(whole)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        F.scaled_dot_product_attention = whole
        torch.backends.mha.set_fastpath_enabled(fast)


def _in_blocks(whole: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.nn.functional.scaled_dot_product_attention` for a block of queries [..., L, E] at a time."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        given = query, key, value, attn_mask, dropout_p, is_causal
        if query.device.type != "cpu" or query.is_nested or query.dim() < 3 or (is_causal and attn_mask is not None):
            return whole(*given, **options)
        queries, keys = query.shape[-2], key.shape[-2]
        size = max(QUERIES, BLOCK // max(1, math.prod(query.shape[:-2]) * keys * query.element_size()))
        if queries <= size:
            return whole(*given, **options)
        blocks = []
        for start in range(0, queries, size):
            mask, end = attn_mask, min(start + size, queries)
            if is_causal:
                mask = torch.arange(start, end).unsqueeze(1) >= torch.arange(keys)
            elif mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
                mask = mask[..., start:end, :]
            blocks.append(whole(query[..., start:end, :], key, value, mask, dropout_p, False, **options))
        return torch.cat(blocks, -2)

    return attention
