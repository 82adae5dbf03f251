"""Adapters: small task-specific modules in every layer of a shared BERT.

All tasks share BERT, the backbone. What is particular to a task is learned by few parameters inside the layers. Each
kind leaves the layer unchanged before training. h is the input of the layer, y an output inside it:

    bottleneck   y + W_D GELU(W_E y + b_E) + b_D      W_E [m,d], W_D [d,m], m << d; W_D, b_E, b_D start at 0
        before   ... on the feed-forward sub-layer's output, before the residual and LayerNorm
        after    ... on the layer's output, after its last LayerNorm
        houlsby  ... on the outputs of both sub-layers, before the residual; all LayerNorms train too
    pal          LN(x + FFN(x) + V_D g(V_E h))        V_E [m,d], V_D [d,m]; g is attention of width m
    lora         W h + b + (alpha / m) B A h          A [m,d], B [d,m], m << d; on query and value; B starts at 0
    lhuc         y * 2 sigmoid(r)                     r [d] starts at 0; scales every unit of the layer's output

In a PAL, x = LN(h + MH(h)), so without its last term it is the ordinary layer. (Differs: the adaptations paper adds h
instead of x.) g lets every token read all tokens. The V_E and V_D of a task serve all layers; the query, key and value
of g belong to one layer. LHUC may be added to any other kind and acts last.

Sources: layer-level adaptations 2.1, 2.2 and 3.2; Houlsby et al. (2019); Stickland and Murray (2019) for PAL; Hu et al.
(2021) for LoRA; Swietojanski and Renals (2014) for LHUC.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from methods import Method

# the places in a layer where an adapter can sit, in the order of computation; see bert.py, BertLayer
SITES = ("query", "key", "value", "attention", "feed_forward", "output")
BOTTLENECK_SIZE = 64
BOTTLENECK_STD = 1e-3
PAL_SIZE = 204
LORA_RANK = 8
LORA_ALPHA = 16


class Context(NamedTuple):
    """What an adapter may read besides the output that it changes."""

    h: torch.Tensor  # [b,s,d], the input of the layer
    extended_mask: torch.Tensor  # [b,1,1,s], as the layer's attention adds it to its scores
    shared: nn.Module | None  # the part that all layers of the task share


def make_linear(d_in, d_out, bias):
    """Make a linear map whose numbers are all 0, without drawing from PyTorch's global generator."""
    linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=bias)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


# --- the kinds: module(output, context) returns what replaces the output -------------------------------------------


class Bottleneck(nn.Module):
    """Project each token down to m numbers, apply GELU, project up, add the result to the output.

    Source: layer-level adaptations 3.2; Houlsby et al. (2019), section 2.1.
    Differs: W_D starts at 0 instead of near 0, so that the layer is exactly unchanged at the start. So W_E has no
    gradient in the first step and a small one later, but the size of Adam's updates does not depend on the gradient's.
    The non-linearity, which the paper leaves open, is BERT's.
    """

    def __init__(self, d, m, generator):
        super().__init__()
        self.encoder = make_linear(d, m, bias=True)
        self.decoder = make_linear(m, d, bias=True)
        # PyTorch expects the two cuts themselves: two standard deviations, as in TensorFlow's truncated normal
        cut = 2 * BOTTLENECK_STD
        nn.init.trunc_normal_(self.encoder.weight, 0.0, BOTTLENECK_STD, -cut, cut, generator)

    def forward(self, output, context=None):
        """Shapes: output [b,s,d]; returns [b,s,d]."""
        middle = nn.functional.gelu(self.encoder(output))  # [b,s,d] -> [b,s,m]
        return output + self.decoder(middle)  # [b,s,m] -> [b,s,d]


class LHUC(nn.Module):
    """Learning hidden unit contributions: scale every unit by a learned number between 0 and 2.

    Source: Swietojanski and Renals (2014), equation 3; layer-level adaptations 3.2.
    """

    def __init__(self, d):
        super().__init__()
        self.r = nn.Parameter(torch.zeros(d))

    def forward(self, output, context=None):
        """Shapes: output [b,s,d]; returns [b,s,d]."""
        return output * (2 * torch.sigmoid(self.r))  # [b,s,d] * [d]: 2 sigmoid(0) = 1


class LoRA(nn.Module):
    """Low-rank adaptation: add a matrix of rank m to a projection of h, as the product B A.

    Source: Hu et al. (2021), section 4.1, equation 3; query and value as in section 5.1.
    Differs: one pair A and B per task. A is normal with BERT's initializer_range; the paper leaves the standard
    deviation open. The released code can also apply dropout to h; here there is none.
    """

    def __init__(self, d, rank, std, generator):
        super().__init__()
        self.down = make_linear(d, rank, bias=False)  # A [m,d]
        self.up = make_linear(rank, d, bias=False)  # B [d,m], which starts at 0
        self.scale = LORA_ALPHA / rank
        nn.init.normal_(self.down.weight, 0.0, std, generator)

    def forward(self, output, context):
        """Shapes: output [b,s,d], the projection W h + b; returns [b,s,d]."""
        # A h first, [b,s,d] -> [b,s,m], so that the matrix B A [d,d] is never formed
        return output + self.scale * self.up(self.down(context.h))


class ProjectedAttention(nn.Module):
    """The g of a PAL: multi-head attention between the projected tokens, without output projection.

    Source: Stickland and Murray (2019), section 3.3.
    Differs: the value starts at 0, so that the layer is unchanged at the start and can learn while the parts that the
    layers share are frozen; as many heads as BERT (the released code: six); no biases and no dropout.
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
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b,s,h,k], then [b,h,s,k]

    def attend(self, x, extended_mask):
        """Let every token attend to the tokens that the mask leaves visible.

        Shapes: x [b,s,m], extended_mask [b,1,1,s]; returns [b,s,m].
        """
        query = self.split_heads(self.query(x))
        key = self.split_heads(self.key(x))
        value = self.split_heads(self.value(x))
        # as in bert.py's attend_plain: scale by sqrt(k), then mask in the scores' own dtype
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # [b,h,s,s]
        scores = scores + extended_mask.to(scores.dtype)
        gathered = torch.softmax(scores, dim=-1, dtype=scores.dtype) @ value  # [b,h,s,s] @ [b,h,s,k] -> [b,h,s,k]
        return gathered.transpose(1, 2).flatten(2)  # [b,s,h,k], then [b,s,m]

    def forward(self, output, context):
        """Add V_D g(V_E h) to the output. Shapes: output [b,s,d]; returns [b,s,d]."""
        narrow = context.shared.encoder(context.h)  # V_E h: [b,s,d] -> [b,s,m]
        return output + context.shared.decoder(self.attend(narrow, context.extended_mask))  # back to [b,s,d]


class SharedProjections(nn.Module):
    """A task's V_E (encoder) and V_D (decoder), which its PALs in all layers share.

    Source: Stickland and Murray (2019), section 3.3.
    Differs: no biases, and no GELU after V_D: this is the paper's equation, not its code.
    """

    def __init__(self, d, m, std, generator):
        super().__init__()
        self.encoder = make_linear(d, m, bias=False)
        self.decoder = make_linear(m, d, bias=False)
        for linear in (self.encoder, self.decoder):
            nn.init.normal_(linear.weight, 0.0, std, generator)


def pal_size(config):
    """Return the width m of a PAL, rounded up so that the heads divide it."""
    heads = config.num_attention_heads
    return math.ceil(PAL_SIZE / heads) * heads


def make_bottleneck(config, generator):
    """Make a bottleneck adapter."""
    return Bottleneck(config.hidden_size, BOTTLENECK_SIZE, generator)


def make_pal(config, generator):
    """Make the attention of a PAL in one layer."""
    return ProjectedAttention(pal_size(config), config.num_attention_heads, config.initializer_range, generator)


def make_projections(config, generator):
    """Make the projections that a task's PALs share."""
    return SharedProjections(config.hidden_size, pal_size(config), config.initializer_range, generator)


def make_lora(config, generator):
    """Make the low-rank matrices of one projection."""
    return LoRA(config.hidden_size, LORA_RANK, config.initializer_range, generator)


def make_lhuc(config, generator):
    """Make the scales of a layer's hidden units."""
    return LHUC(config.hidden_size)


@dataclass(frozen=True)
class Kind:
    """One kind of adapter: where it sits and how it is built."""

    sites: tuple  # those of SITES that get a module each
    make: Callable  # (config, generator) -> module(output, context)
    make_shared: Callable | None = None  # (config, generator) -> the module that a task's layers share
    layer_norms: bool = False  # whether BERT's LayerNorms train with it
    addable: bool = False  # whether it may be added to another kind; then it acts after that one


# Every choice of --adapter. A file outside adds a kind with one entry: KINDS["mine"] = Kind(("output",), make_mine).
KINDS = {
    "before": Kind(("feed_forward",), make_bottleneck),
    "after": Kind(("output",), make_bottleneck),
    "houlsby": Kind(("attention", "feed_forward"), make_bottleneck, layer_norms=True),
    "pal": Kind(("feed_forward",), make_pal, make_projections),
    "lora": Kind(("query", "value"), make_lora),
    "lhuc": Kind(("output",), make_lhuc, addable=True),
}


# --- all layers and tasks ------------------------------------------------------------------------------------------


class Adapters(nn.Module):
    """The adapters of all layers and tasks, which BERT calls through its slot `make_adapt`.

    `layers[i][task][site][kind]` is one adapter, `shared[task]` the part that a task's layers share.
    """

    def __init__(self, layers, shared):
        super().__init__()
        self.layers = layers
        self.shared = shared

    def attach(self, bert):
        """Put them into the slot of a BertModel."""
        # the method, not the module, whose parameters would be registered a second time, under bert
        bert.make_adapt = self.forward

    def forward(self, layer_index, task_name, h, extended_mask):
        """Return the function adapt(site, output) of one layer for a task.

        Shapes: h [b,s,d], extended_mask [b,1,1,s].
        """
        sites = self.layers[layer_index][task_name]
        context = Context(h, extended_mask, self.shared[task_name] if len(self.shared) else None)

        def adapt(site, output):
            # a site without adapters returns its output as it is
            for adapter in sites[site].values():
                output = adapter(output, context)
            return output

        return adapt


def make_adapters(config, task_names, kinds, generator=None):
    """Make the adapters of some kinds for every layer and task, drawn from the generator.

    `kinds` are names of KINDS: one, and any addable ones.
    """
    ordered = sorted((kind for kind in KINDS if kind in kinds), key=lambda kind: KINDS[kind].addable)

    def make_site(site):
        chosen = [kind for kind in ordered if site in KINDS[kind].sites]
        return nn.ModuleDict({kind: KINDS[kind].make(config, generator) for kind in chosen})

    def make_task():
        return nn.ModuleDict({site: make_site(site) for site in SITES})

    layers = nn.ModuleList(
        nn.ModuleDict({name: make_task() for name in task_names}) for _ in range(config.num_hidden_layers)
    )
    # at most one of the kinds has a shared part, since no addable kind has one
    makers = [KINDS[kind].make_shared for kind in ordered if KINDS[kind].make_shared]
    shared = nn.ModuleDict({name: make(config, generator) for make in makers for name in task_names})
    return Adapters(layers, shared)


def trained_with(name, kinds):
    """Return whether a parameter of the model trains while adapters of these kinds adapt a frozen BERT.

    Adapters, heads, exits and LTE always do; of the backbone the LayerNorms do, with Houlsby's adapters only.

    Source: Houlsby et al. (2019), section 2.
    Differs: PAL trains all of the backbone in its paper: --train_backbone.
    """
    if not name.startswith("bert."):
        return True
    return "layer_norm" in name and any(KINDS[kind].layer_norms for kind in kinds)


# --- the record ----------------------------------------------------------------------------------------------------


def add_flags(group):
    """Add the flags of the adapters."""
    group.add_argument(
        "--adapter",
        nargs="+",
        choices=("none", *KINDS),
        default=["none"],
        help="small task-specific modules in every layer of a frozen BERT; lhuc may be added to another kind",
    )
    group.add_argument("--train_backbone", action="store_true", help="train BERT along with the adapters")


def conflicts(flags, typed):
    """List the combinations of flags that make no sense."""
    chosen = flags["adapter"]
    is_on = chosen != ["none"]
    return [
        (
            flags["option"] == "pretrain" and is_on,
            "--adapter freezes BERT by itself (without --train_backbone): use --option finetune",
        ),
        ("none" in chosen and len(chosen) > 1, "--adapter none excludes the other adapters"),
        (
            sum(kind != "none" and not KINDS[kind].addable for kind in set(chosen)) > 1,
            f"--adapter {' '.join(chosen)}: only "
            f"{', '.join(kind for kind in KINDS if KINDS[kind].addable)} may be combined with another adapter",
        ),
        (flags["train_backbone"] and not is_on, "--train_backbone belongs to --adapter: without it BERT trains anyway"),
    ]


def build_chosen(flags, config, task_names, generator):
    """Build the adapters that --adapter names, or None."""
    if flags["adapter"] == ["none"]:
        return None
    return make_adapters(config, task_names, flags["adapter"], generator)


def trains(flags, model):
    """Return the names of the parameters that train with the adapters; None, for all, if the backbone trains."""
    if flags["adapter"] == ["none"] or flags["train_backbone"]:
        return None
    return {name for name, _ in model.named_parameters() if trained_with(name, flags["adapter"])}


ADAPTERS = Method(
    title="adapters (layer-level adaptations 2.1, 3.2; LoRA)",
    add_flags=add_flags,
    conflicts=conflicts,
    adapters=build_chosen,
    trains=trains,
)
