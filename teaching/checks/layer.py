"""Checks of part layer: one Transformer layer."""

import torch

from bert import BertLayer

from .common import Scale, gradients_of


def draw_layer(draw):
    """Return a layer with random parameters, and a hidden state [b,s,d]."""
    config = draw.config()
    config.hidden_act = draw.choice(("gelu", "relu", "gelu_new"))
    layer = draw.randomise(BertLayer(config, "plain")).eval()
    h = draw.normal(draw.number(1, 1 + draw.size), draw.number(2, 3 + draw.size), config.hidden_size)
    draw.show(h=h)
    return layer, h


def extended(draw, h):
    """Return a mask with padding as it is added to the scores."""
    mask = draw.mask(*h.shape[:2])
    draw.show(mask=mask)
    return (1.0 - mask[:, None, None, :].double()) * -1e4


def residuals(draw):
    """Compute a layer without padding."""
    layer, h = draw_layer(draw)
    mask = torch.zeros(len(h), 1, 1, h.shape[1], dtype=h.dtype)
    return {"forward": layer(h, mask), "gradients": gradients_of(layer, (h,), lambda h: layer(h, mask))}


def masked(draw):
    """Compute a layer with padding."""
    layer, h = draw_layer(draw)
    return {"forward": layer(h, extended(draw, h))}


def dropout(draw):
    """Replace one dropout after the other by a fixed pattern."""
    layer, h = draw_layer(draw)
    mask = extended(draw, h)
    results = {}
    for name in ("attention_dropout", "out_dropout", "self_attention.dropout"):
        owner, _, last = name.rpartition(".")
        owner = layer.get_submodule(owner)
        before = getattr(owner, last)
        setattr(owner, last, Scale())
        results[f"forward with {name}"] = layer(h, mask)
        setattr(owner, last, before)
    return results


def adapters(draw):
    """Change the output of each site of the adapter slot, after dropout, and note the order of the sites."""
    layer, h = draw_layer(draw)
    layer.attention_dropout, layer.out_dropout = Scale(), Scale()
    mask, sites = extended(draw, h), []
    factors = {
        site: 1 + 0.5 * i for i, site in enumerate(("query", "key", "value", "attention", "feed_forward", "output"))
    }

    def adapt(site, output):
        sites.append(site)
        return output * factors[site] + 1

    result = layer(h, mask, adapt)
    return {"forward": result, "sites": " ".join(sites)}
