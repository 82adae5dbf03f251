"""Checks of part embeddings: the sum of the embeddings, the mask, the pooler."""

import torch

from bert import BertModel
from early_exit import Exit

from .common import Scale, call, gradients_of


def draw_model(draw):
    """Return a BERT with random parameters."""
    return draw.randomise(BertModel(draw.config(), generator=draw.generator())).eval()


def draw_ids(draw):
    """Return token ids and segment ids, [b,s] each."""
    b, s = draw.number(1, 1 + draw.size), draw.number(2, 4 + draw.size)
    ids = draw.numbers(1, 19, b, s)
    ids[0, -1] = 0  # padding
    return ids, draw.numbers(0, 1, b, s)


def lookup(draw):
    """Embed tokens; then with a fixed pattern in place of dropout."""
    model, (ids, types) = draw_model(draw), draw_ids(draw)
    draw.show(input_ids=ids, token_type_ids=types)
    plain = model.embed(ids, types)
    model.embed_dropout = Scale()
    dropped = model.embed(ids, types)
    gradients = gradients_of(model, (), lambda: model.embed(ids.clamp(min=1), types))
    return {"embed": plain, "embed with dropout": dropped, "gradients": gradients}


def limits(draw):
    """Embed without segment ids; embed as many tokens as there are positions, and one more."""
    model, (ids, _) = draw_model(draw), draw_ids(draw)
    most = model.config.max_position_embeddings
    draw.show(input_ids=ids)
    long = draw.numbers(1, 19, 1, most + 1)
    longest = model.embed(long[:, :most])
    refused = call(model.embed, long)
    return {
        "embed": model.embed(ids),
        "embed of the longest text": longest,
        "embed of one token more": refused if isinstance(refused, str) else "no InputError",
    }


def mask(draw):
    """Extend a mask in two precisions."""
    model = draw_model(draw)
    mask = draw.mask(draw.number(1, 1 + draw.size), draw.number(2, 3 + draw.size))
    draw.show(mask=mask)
    result = model.extend_mask(mask, torch.float64)
    half = model.extend_mask(mask, torch.float16)
    return {"extend_mask": result, "extend_mask in float16": half.double(), "dtypes": f"{result.dtype} {half.dtype}"}


def pooler(draw):
    """Pool a hidden state with the model's pooler and with an exit's."""
    model = draw_model(draw)
    h = draw.normal(draw.number(1, 1 + draw.size), draw.number(2, 3 + draw.size), model.config.hidden_size)
    draw.show(h=h, W=model.pooler_dense.weight, b=model.pooler_dense.bias)
    early = draw.randomise(Exit(model, torch.nn.ModuleDict(), True))
    return {
        "BertModel.pool": lambda: model.pool(h),
        "Exit.pool": lambda: early.pool(h),
        "gradients of BertModel.pool": lambda: gradients_of(model.pooler_dense, (h,), model.pool),
        "gradients of Exit.pool": lambda: gradients_of(early.pooler_dense, (h,), early.pool),
    }
