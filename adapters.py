"""Adapters: small task-specific parts in every layer of a shared BERT; read bert.py (the adapter slot) before it.

All tasks share the backbone, and what is particular to a task is learned by few parameters inside the layers,
with m much smaller than the hidden size d. Each form is the identity before training:

    bottleneck   h + W_D GELU(W_E h + b_E) + b_D            W_E [m,d], W_D [d,m]; W_D, b_E, b_D start at 0
        before   ... on the feed-forward sub-layer's output, before the residual and LayerNorm
        after    ... on the layer's output, after its last LayerNorm
        houlsby  ... on the outputs of both sub-layers, before the residual; all LayerNorms train along
    lhuc         h * 2 sigmoid(r)                           r [d] starts at 0; scales every unit of the layer's output
    pal          LN(x + FFN(x) + V_D g(V_E h))              V_E [m,d], V_D [d,m]; g's value starts at 0

Here x = LN(h + MH(h)) is what the first sub-layer gives, so that without the last term it is the ordinary layer (the
paper's h + SA(h) + TS(h) leaves it open where SA's own residual is). g is multi-head attention of width m between all
tokens, so that a PAL runs beside the layer where the others sit within it. A task's V_E and V_D serve all layers; g's
query, key and value are the layer's own. LHUC may be added to any other form and then comes last.

Sources: layer-level adaptations 2.1, 2.2 and 3.2; Houlsby et al. (2019); Stickland and Murray (2019) for PAL;
Swietojanski and Renals (2014) for LHUC. Where we depart from them is said under `Differs:` at each class.
"""

import math

import torch
from torch import nn

SITES = ("attention", "feed_forward", "output")
# where each form sits; at a site they act in this order
PLACES = {
    "before": ("feed_forward",),
    "after": ("output",),
    "houlsby": ("attention", "feed_forward"),
    "pal": ("feed_forward",),
    "lhuc": ("output",),
}
BOTTLENECK_SIZE = 64
BOTTLENECK_STD = 1e-3
PAL_SIZE = 204


def make_linear(d_in, d_out, bias):
    """Make a linear map that gives 0, without drawing from PyTorch's global generator."""
    linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=bias)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


class Bottleneck(nn.Module):
    """Project down to m numbers a token, apply GELU, project up, add to what came in.

    Source: layer-level adaptations 3.2; Houlsby et al. (2019), section 2.1.
    Differs: W_D starts at 0 instead of near 0, which makes the start the identity exactly. It costs W_E its first
    step, in which W_E has no gradient; from then on Adam's updates do not depend on how small W_D is. The
    non-linearity, open in the paper, is BERT's.
    """

    def __init__(self, d, m, generator):
        super().__init__()
        self.encoder = make_linear(d, m, bias=True)
        self.decoder = make_linear(m, d, bias=True)
        # the cut is absolute in PyTorch: at two standard deviations, as TensorFlow's truncated normal has it
        cut = 2 * BOTTLENECK_STD
        nn.init.trunc_normal_(self.encoder.weight, 0.0, BOTTLENECK_STD, -cut, cut, generator)

    def forward(self, h):
        """Shapes: h [b,s,d]; returns [b,s,d]."""
        return h + self.decoder(nn.functional.gelu(self.encoder(h)))


class LHUC(nn.Module):
    """Learning hidden unit contributions: scale every unit by a learned number between 0 and 2.

    Source: Swietojanski and Renals (2014), equation 3; layer-level adaptations 3.2.
    """

    def __init__(self, d):
        super().__init__()
        self.r = nn.Parameter(torch.zeros(d))

    def forward(self, h):
        """Shapes: h [b,s,d]; returns [b,s,d]."""
        return h * (2 * torch.sigmoid(self.r))


class ProjectedAttention(nn.Module):
    """A PAL's g: multi-head attention between the projected tokens, without output projection.

    Source: Stickland and Murray (2019), section 3.3.
    Differs: the value starts at 0, which makes the start the identity and lets a layer learn while what the layers
    share is frozen; as many heads as BERT (the released code: six), and no biases and no dropout.
    """

    def __init__(self, m, heads, std, generator):
        super().__init__()
        self.heads = heads
        self.query = make_linear(m, m, bias=False)
        self.key = make_linear(m, m, bias=False)
        self.value = make_linear(m, m, bias=False)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, 0.0, std, generator)

    def split_heads(self, x):
        """Cut the width into heads: [b,s,m] to [b,h,s,k]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b,s,h,k], [b,h,s,k]

    def forward(self, x, extended_mask):
        """Let every token gather from the tokens that the mask leaves visible.

        Shapes: x [b,s,m], extended_mask [b,1,1,s]; returns [b,s,m].
        """
        query = self.split_heads(self.query(x))
        key = self.split_heads(self.key(x))
        value = self.split_heads(self.value(x))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # [b,h,s,s]
        gathered = torch.softmax(scores + extended_mask.to(scores.dtype), dim=-1) @ value  # [b,h,s,k]
        return gathered.transpose(1, 2).flatten(2)  # [b,s,h,k], [b,s,m]


class SharedProjections(nn.Module):
    """A task's V_E (encoder) and V_D (decoder), which its PALs in all layers share.

    Source: Stickland and Murray (2019), section 3.3.
    Differs: no biases, and no GELU after V_D: the paper's equation, not its code.
    """

    def __init__(self, d, m, std, generator):
        super().__init__()
        self.encoder = make_linear(d, m, bias=False)
        self.decoder = make_linear(m, d, bias=False)
        for linear in (self.encoder, self.decoder):
            nn.init.normal_(linear.weight, 0.0, std, generator)


class Adapters(nn.Module):
    """The adapters of all layers and tasks, called from the layers' adapter slot.

    `layers[i][task][site][kind]` is one adapter, `shared[task]` what a task's PALs share. A call without a task
    leaves the layer as it is.
    """

    def __init__(self, layers, shared):
        super().__init__()
        self.layers = layers
        self.shared = shared

    def attach(self, bert):
        """Put the adapters into the slot of every layer.

        The slot gets the method, not this module: its parameters stay registered once, under this module's owner.
        """
        for layer in bert.bert_layers:
            layer.adapter = self.forward

    def forward(self, sublayer_output, layer_input, extended_mask, layer_index, task, site):
        """Adapt what a site of a layer gives, for a task.

        Shapes: sublayer_output and layer_input [b,s,d], extended_mask [b,1,1,s]; returns [b,s,d].
        """
        if task is None:
            return sublayer_output
        h = sublayer_output
        for kind, adapter in self.layers[layer_index][task][site].items():
            if kind == "pal":
                shared = self.shared[task]
                h = h + shared.decoder(adapter(shared.encoder(layer_input), extended_mask))
            else:
                h = adapter(h)
        return h


def pal_size(size, heads):
    """The width m of a PAL: what is asked for, rounded up to a multiple of the heads."""
    return math.ceil((size or PAL_SIZE) / heads) * heads


def make_adapter(kind, config, size, generator):
    """Make the adapter of one kind for one site of one layer."""
    if kind == "lhuc":
        return LHUC(config.hidden_size)
    if kind == "pal":
        heads = config.num_attention_heads
        return ProjectedAttention(pal_size(size, heads), heads, config.initializer_range, generator)
    return Bottleneck(config.hidden_size, size or BOTTLENECK_SIZE, generator)


def build_adapters(config, task_names, kinds, size=None, generator=None):
    """Make the adapters of the given kinds for every layer and task, drawn from the generator.

    `kinds` is one of PLACES, or two of which one is "lhuc". `size` is m; None is the literature's for each kind.
    """

    def make_site(site):
        chosen = [kind for kind in PLACES if kind in kinds and site in PLACES[kind]]
        return nn.ModuleDict({kind: make_adapter(kind, config, size, generator) for kind in chosen})

    def make_task():
        return nn.ModuleDict({site: make_site(site) for site in SITES})

    def make_shared():
        m = pal_size(size, config.num_attention_heads)
        return SharedProjections(config.hidden_size, m, config.initializer_range, generator)

    layers = nn.ModuleList(
        nn.ModuleDict({name: make_task() for name in task_names}) for _ in range(config.num_hidden_layers)
    )
    shared = nn.ModuleDict({name: make_shared() for name in task_names if "pal" in kinds})
    return Adapters(layers, shared)


def trained_with(name, kinds):
    """Tell whether a parameter of the whole model trains while adapters of these kinds adapt a frozen BERT.

    Adapters, heads, exits and LTE always do; of the backbone the LayerNorms do, with Houlsby's adapters only.

    Source: Houlsby et al. (2019), section 2.
    Differs: PAL trains the whole backbone in its paper: --train_backbone.
    """
    if not name.startswith("bert."):
        return True
    return "houlsby" in kinds and "layer_norm" in name


def count_parameters(adapters):
    """Count the adapters' parameters: {kind: {task: number}}, a PAL's with what its layers share."""
    counts = {}

    def add(kind, task, module):
        of_kind = counts.setdefault(kind, {})
        of_kind[task] = of_kind.get(task, 0) + sum(parameter.numel() for parameter in module.parameters())

    for layer in adapters.layers:
        for task, sites in layer.items():
            for site in sites.values():
                for kind, adapter in site.items():
                    add(kind, task, adapter)
    for task, projections in adapters.shared.items():
        add("pal", task, projections)
    return counts


def parameter_report(adapters):
    """Give the lines of a table: trainable parameters of the adapters by kind and task."""
    counts = count_parameters(adapters)
    tasks = list(adapters.layers[0])
    lines = [f"{'adapter':<12}" + "".join(f"{name:>12}" for name in (*tasks, "all tasks"))]
    for kind, of_kind in counts.items():
        numbers = [of_kind[task] for task in tasks]
        lines.append(f"{kind:<12}" + "".join(f"{number:>12,}" for number in (*numbers, sum(numbers))))
    return lines
