"""Checks of part adapters: the forward pass of each kind."""

import copy

import torch

from adapters import LHUC, Bottleneck, Context, LoRA, ProjectedAttention, SharedProjections

from .common import gradients_of


def draw_states(draw):
    """Return the layer's input h and an output of the layer, [b,s,d] each, and d."""
    d = draw.number(2, 3 + 2 * draw.size)
    b, s = draw.number(1, 1 + draw.size), draw.number(1, 2 + draw.size)
    h, output = draw.normal(b, s, d), draw.normal(b, s, d)
    draw.show(h=h, output=output)
    return h, output, d


def show_parameters(draw, module):
    """Print the parameters of a module in the report."""
    draw.show(**{name: parameter.detach() for name, parameter in module.named_parameters()})
    return module


def bottleneck(draw):
    """Run a bottleneck."""
    h, output, d = draw_states(draw)
    module = show_parameters(draw, draw.randomise(Bottleneck(d, draw.number(1, 3), draw.generator())))
    return {"forward": module(output, Context(h, None, None)), "forward without context": module(output)}


def lhuc(draw):
    """Run LHUC."""
    h, output, d = draw_states(draw)
    module = show_parameters(draw, draw.randomise(LHUC(d)))
    results = {"forward": module(output, Context(h, None, None)), "forward without context": module(output)}
    return results | {"gradients": gradients_of(module, (output,), module)}


def lora(draw):
    """Run LoRA with two ranks."""
    h, output, d = draw_states(draw)
    results = {}
    for rank in (1, 2 + draw.size):
        module = show_parameters(draw, draw.randomise(LoRA(d, rank, 0.1, draw.generator())))
        results[f"forward with rank {rank}"] = module(output, Context(h, None, None))
        results[f"gradients with rank {rank}"] = gradients_of(
            module, (h, output), lambda h, y, lora=module: lora(y, Context(h, None, None))
        )
    return results


def pal(draw):
    """Run a projected attention layer, and its attention, with padding."""
    heads, k = 1 + draw.size, draw.number(2, 3)
    m, d = heads * k, heads * k + 1
    b, s = draw.number(1, 1 + draw.size), draw.number(2, 3 + draw.size)
    h, output, mask = draw.normal(b, s, d), draw.normal(b, s, d), draw.mask(b, s)
    extended = (1.0 - mask[:, None, None, :].double()) * -1e4
    module = draw.randomise(ProjectedAttention(m, heads, 0.1, draw.generator()))
    shared = draw.randomise(SharedProjections(d, m, 0.1, draw.generator()))
    draw.show(h=h, output=output, mask=mask, heads=heads)
    narrow = draw.normal(b, s, m)
    cells = torch.arange(b * s * m, dtype=torch.float64).view(b, s, m)
    return {
        "split_heads": lambda: module.split_heads(cells),
        "attend": lambda: module.attend(narrow, extended),
        "forward": lambda: module(output, Context(h, extended, shared)),
        "dtype of attend for bfloat16": lambda: str(
            copy.deepcopy(module).bfloat16().attend(narrow.bfloat16(), extended.float()).dtype
        ),
        "output afterwards": lambda: output,
        "gradients": lambda: gradients_of(
            torch.nn.ModuleList([module, shared]), (h, output), lambda h, y: module(y, Context(h, extended, shared))
        ),
    }
