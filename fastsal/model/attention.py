"""Attention by plain operations, a few examples or a block of queries at a time.

The fused kernels have neither forward-mode nor second derivatives. Plain operations have, but form the weights of every query
with every key, and pass over them in memory several times: 54 MB a layer for the 1500 places of a Whisper tiny's encoder. Taken
in blocks that fit a cache, a JVP at the log-mel features of that Whisper, the derivative of a recorded backward pass, takes
0.58 s instead of 0.94 s, where a VJP through fused attention takes 0.41 s (one run on a Zen 4, 2 threads).
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Bytes of the weights of a block. With 8 MiB a JVP of 64 examples, 12 heads and 197 places takes 1.2 to 1.3 of the time in one
# piece, with 16 MiB 0.7 to 0.9; of 1, 4 or 16 examples with 1500 or 512 places both take 0.6 to 0.8.
BLOCK = 1 << 24
QUERIES = 64  # in a block at least: at (16, 12, 512) blocks of 5 queries took twice the time of one piece


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
    """`torch.nn.functional.scaled_dot_product_attention` for some examples, or a block of queries of one, at a time."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        mask = attn_mask
        plain = query.device.type == "cpu" and not query.is_nested and query.dim() >= 3
        if not plain or (is_causal and mask is not None):
            return whole(query, key, value, mask, dropout_p, is_causal, **options)
        queries, keys = query.shape[-2], key.shape[-2]
        of_query = math.prod(query.shape[:-2]) * keys * query.element_size()
        if of_query * queries <= BLOCK:
            return whole(query, key, value, mask, dropout_p, is_causal, **options)
        # By `split`, whose derivative is one concatenation; that of a slice fills the rest of the whole with zeros.
        dims, count = query.dim(), len(query)
        alike = dims == key.dim() == value.dim() and count == len(key) == len(value)
        if count > 1 and alike:
            size = max(1, BLOCK * count // (of_query * queries))
            parts = zip(query.split(size), key.split(size), value.split(size), strict=True)
            masks: Iterable[Tensor | None] = itertools.repeat(mask)
            if mask is not None and mask.dim() == dims and len(mask) == count:
                masks = mask.split(size)
            each = zip(parts, masks, strict=False)
            return torch.cat([attention(*qkv, own, dropout_p, is_causal, **options) for qkv, own in each])
        size = max(QUERIES, BLOCK // of_query)
        masks = itertools.repeat(mask)
        if is_causal:
            masks = (rows >= torch.arange(keys) for rows in torch.arange(queries).unsqueeze(1).split(size))
        elif mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            masks = mask.split(size, -2)
        each = zip(query.split(size, -2), masks, strict=False)
        return torch.cat([whole(block, key, value, own, dropout_p, False, **options) for block, own in each], -2)

    return attention
