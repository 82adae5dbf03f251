"""Checks of part attention: splitting into heads, scores, mask, dropout."""

import torch

from bert import BertSelfAttention, attend_plain

from .common import Scale, gradients_of


def draw_heads(draw):
    """Return query, key, value [b,h,s,k]."""
    n = draw.size
    shape = draw.number(1, 1 + n), draw.number(1, 1 + 2 * n), draw.number(2, 2 + n), draw.number(2, 3 + n)
    return tuple(draw.normal(*shape) for _ in range(3))


def extended(mask):
    """Return the mask [b,1,1,s] that is added to the scores."""
    return (1.0 - mask[:, None, None, :].double()) * -1e4


def heads(draw):
    """Cut a tensor of numbered cells into heads; join such heads again."""
    config = draw.config(heads=2 + draw.size)
    module, k = BertSelfAttention(config, "plain"), config.hidden_size // config.num_attention_heads
    b, s = draw.number(1, 1 + draw.size), draw.number(2, 3 + draw.size)
    x = torch.arange(b * s * config.hidden_size, dtype=torch.float64).view(b, s, -1)
    y = torch.arange(x.numel(), dtype=torch.float64).view(b, config.num_attention_heads, s, k)
    draw.show(x=x, y=y)
    return {
        "split_heads(x)": lambda: module.split_heads(x),
        "merge_heads(y)": lambda: module.merge_heads(y),
        "gradient of split_heads": lambda: gradients_of(None, (x,), module.split_heads),
        "gradient of merge_heads": lambda: gradients_of(None, (y,), module.merge_heads),
    }


def scores(draw):
    """Attend without padding and without dropout."""
    query, key, value = draw_heads(draw)
    draw.show(query=query, key=key, value=value)
    mask = torch.zeros(len(query), 1, 1, query.shape[2], dtype=torch.float64)
    return {
        # copies, because a right solution may scale its query in place
        "attend_plain": attend_plain(query.clone(), key.clone(), value.clone(), mask, torch.nn.Identity()),
        "attend_plain of large scores": attend_plain(100 * query, 100 * key, value, mask, torch.nn.Identity()),
        "gradients": gradients_of(
            None, (query, key, value), lambda q, k, v: attend_plain(q, k, v, mask, torch.nn.Identity())
        ),
    }


def padding(draw):
    """Attend with padding; one row has nothing but padding."""
    query, key, value = draw_heads(draw)
    mask = draw.mask(len(query), query.shape[2])
    if draw.size == 2:
        mask[-1] = 0
    draw.show(query=query, key=key, value=value, mask=mask)
    result = attend_plain(query, key, value, extended(mask), torch.nn.Identity())
    # a row of padding alone means nothing: its numbers must be finite, so that they do not spread
    finite, result = str(bool(result.isfinite().all())), result[mask.any(1)]
    return {"attend_plain": result, "finite": finite}


def dropout(draw):
    """Replace dropout by a fixed pattern; then attend in bfloat16 with a float32 mask."""
    query, key, value = draw_heads(draw)
    mask = draw.mask(len(query), query.shape[2])
    draw.show(query=query, key=key, value=value, mask=mask, dropout="weight of token j times (j + 1) / 2")
    narrow = [x.bfloat16() for x in (query, key, value)]
    return {
        "attend_plain": lambda: attend_plain(query, key, value, extended(mask), Scale()),
        "dtype for bfloat16 inputs": lambda: str(
            attend_plain(*narrow, extended(mask).float(), torch.nn.Identity()).dtype
        ),
    }
