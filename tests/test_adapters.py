"""Adapters: definitions against independent references, identity at start, sizes, and what trains."""

import argparse
import copy
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from tiny import make_batch, make_config, make_model
from torch import nn

import adapters as adapters_file
from adapters import (
    ADAPTERS,
    BOTTLENECK_STD,
    KINDS,
    LHUC,
    LORA_ALPHA,
    LORA_RANK,
    SITES,
    Bottleneck,
    Context,
    Kind,
    LoRA,
    ProjectedAttention,
    make_adapters,
    trained_with,
)
from base_bert import BertConfig
from tasks import build_tasks

COMBINATIONS = [(kind,) for kind in KINDS] + [(kind, "lhuc") for kind in KINDS if kind != "lhuc"]
NAMES = ["+".join(kinds) for kinds in COMBINATIONS]


def seeded(seed=0):
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def adapt(model, kinds, random=False, dtype=torch.float64):
    """Give a tiny model adapters; `random` fills all their parameters, so that none is the identity."""
    adapters = make_adapters(model.bert.config, list(model.tasks), kinds, seeded())
    generator = seeded(1)
    if random:
        for parameter in adapters.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
    model.adapters = adapters.to(dtype)
    model.adapters.attach(model.bert)
    return model


def losses(model, batch):
    """The summed loss over all exits that the model has."""
    outputs = model(batch, exits=tuple(range(1, model.depth + 1)) if len(model.exits) else None)
    return sum(batch.task.objective.loss(logits, batch.labels).sum() for logits in outputs.logits.values())


def snapshot(model):
    """A copy of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---- definitions -----------------------------------------------------------------------------------------


def test_bottleneck_by_hand():
    """d = 2, m = 1: the token (1, 2) gives W_E h + b_E = 1, GELU(1) = .841345, and (1 + .841345 * 3, 2 + .5)."""
    bottleneck = Bottleneck(2, 1, None).double()
    values = {
        "encoder.weight": [[2.0, -1.0]],
        "encoder.bias": [1.0],
        "decoder.weight": [[3.0], [0.0]],
        "decoder.bias": [0.0, 0.5],
    }
    bottleneck.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    gelu = (1 + math.erf(1 / math.sqrt(2))) / 2
    given = bottleneck(torch.tensor([[[1.0, 2.0]]], dtype=torch.float64))
    torch.testing.assert_close(given, torch.tensor([[[1 + 3 * gelu, 2.5]]], dtype=torch.float64))


def test_lhuc_by_hand():
    """sigmoid(log 3) = 3/4, sigmoid(0) = 1/2, sigmoid(-log 3) = 1/4."""
    lhuc = LHUC(3)
    lhuc.load_state_dict({"r": torch.tensor([math.log(3), 0.0, -math.log(3)])})
    torch.testing.assert_close(lhuc(torch.full((1, 2, 3), 4.0)), torch.tensor([6.0, 4.0, 2.0]).expand(1, 2, 3))


def torch_attention(pal, x, mask):
    """PyTorch's multi-head attention with a PAL's weights and the identity as output projection."""
    m = x.shape[-1]
    attention = nn.MultiheadAttention(m, pal.heads, bias=False, batch_first=True, dtype=x.dtype)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([pal.query.weight, pal.key.weight, pal.value.weight]))
        attention.out_proj.weight.copy_(torch.eye(m))
    return attention(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0]


def test_projected_attention_equals_pytorch_values_and_gradients():
    pal = ProjectedAttention(12, 3, 0.7, seeded()).double()
    x = torch.randn(2, 7, 12, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    upstream = torch.randn(2, 7, 12, generator=seeded(3), dtype=torch.float64)
    results = []
    for given in (pal.attend(x, (1.0 - mask[:, None, None].double()) * -1e4), torch_attention(pal, x, mask)):
        results.append((given, *torch.autograd.grad((given * upstream).sum(), x)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def merge(attention, sites):
    """Replace the weights W of an attention's projections by W + (alpha / r) B A."""
    with torch.no_grad():
        for site in ("query", "value"):
            lora = sites[site]["lora"]
            product = lora.up.weight @ lora.down.weight
            getattr(attention, site).weight.add_(LORA_ALPHA / len(lora.down.weight) * product)


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=NAMES)
def test_each_kind_sits_where_its_paper_puts_it(kinds):
    """The whole layer written out from the papers' equations, with adapters that are far from the identity."""
    model = adapt(make_model(), kinds, random=True)
    batch = make_batch(model.tasks["para"])
    (h,), (mask,) = model.embed(batch), model.masks(batch)
    for i, layer in enumerate(model.bert.bert_layers):
        sites = model.adapters.layers[i]["para"]
        extended_mask = model.bert.extend_mask(mask, h.dtype)
        attention = copy.deepcopy(layer.self_attention)
        if "lora" in kinds:
            merge(attention, sites)
        attended = layer.attention_dense(attention(h, extended_mask))
        if "houlsby" in kinds:
            attended = sites["attention"]["houlsby"](attended)
        middle = layer.attention_layer_norm(h + attended)
        transformed = layer.out_dense(nn.functional.gelu(layer.interm_dense(middle)))
        for kind in {"before", "houlsby"} & set(kinds):
            transformed = sites["feed_forward"][kind](transformed)
        if "pal" in kinds:
            shared = model.adapters.shared["para"]
            projected = torch_attention(sites["feed_forward"]["pal"], h @ shared.encoder.weight.T, mask)
            transformed = transformed + projected @ shared.decoder.weight.T
        expected = layer.out_layer_norm(middle + transformed)
        if "after" in kinds:
            expected = sites["output"]["after"](expected)
        if "lhuc" in kinds:
            expected = expected * 2 / (1 + torch.exp(-sites["output"]["lhuc"].r))
        adapted = model.adapters(i, "para", h, extended_mask)
        h_next = layer(h, extended_mask, adapted)
        # the states of padding are never read, and PyTorch sets some of them to 0
        torch.testing.assert_close(h_next[mask == 1], expected[mask == 1], rtol=1e-10, atol=1e-10)
        other = model.adapters(i, "sst", h, extended_mask)
        assert not torch.allclose(h_next, layer(h, extended_mask, other))
        h = h_next


# ---- start and sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=NAMES)
@pytest.mark.parametrize("precision", ["float64", "float32", "autocast"])
def test_identity_at_start_to_the_bit(kinds, precision):
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = make_model(dtype=dtype)
    batch = make_batch(model.tasks["sts"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        plain = model(batch)
        adapted = adapt(model, kinds, dtype=dtype)(batch)
        assert torch.equal(adapted.logits[3], plain.logits[3])
        assert adapted.logits[3].dtype == plain.logits[3].dtype
        random = adapt(model, kinds, random=True, dtype=dtype)(batch)
    assert not torch.equal(random.logits[3], plain.logits[3])


def test_bottleneck_starts_truncated_normal():
    weight = Bottleneck(300, 64, seeded()).encoder.weight
    assert weight.abs().max() <= 2 * BOTTLENECK_STD
    # a normal cut at two standard deviations has .8796 of its standard deviation
    assert weight.std().item() == pytest.approx(0.8796 * BOTTLENECK_STD, rel=0.02)


def test_building_draws_from_the_given_generator_only():
    before = torch.get_rng_state()
    first, again, other = (
        make_adapters(make_config(), ["sst"], ("pal", "houlsby"), seeded(s)).state_dict() for s in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("before", 12 * (2 * 768 * 64 + 64 + 768)),
        ("after", 12 * (2 * 768 * 64 + 64 + 768)),
        ("houlsby", 2_379_264),  # 2.38 M in Houlsby et al.
        ("pal", 1_811_520),  # 1.81 M: 2 * 768 * 204 shared, and 3 * 204 * 204 a layer
        ("lora", 294_912),  # 0.3 M in Hu et al., table 2 (RoBERTa base, with the same d and L)
        ("lhuc", 9_216),
    ],
)
def test_parameters_per_task_of_bert_base(kind, expected):
    adapters = make_adapters(BertConfig(), ["sst"], (kind,), seeded())
    assert sum(parameter.numel() for parameter in adapters.parameters()) == expected


def test_the_width_of_a_pal_is_rounded_up_to_whole_heads(monkeypatch):
    for width in (5, 6):  # two heads
        monkeypatch.setattr(adapters_file, "PAL_SIZE", width)
        adapters = make_adapters(make_config(layers=2, hidden=16), ["sst"], ("pal",))
        assert sum(parameter.numel() for parameter in adapters.parameters()) == 2 * 16 * 6 + 2 * 3 * 36


# ---- LoRA ------------------------------------------------------------------------------------------------


def test_lora_by_hand():
    """d = 2, r = 1: A h = 1 * 3 + 2 * 4 = 11, alpha / r = 16, B A h = (11, -5.5)."""
    lora = LoRA(2, 1, 0.02, None).double()
    lora.load_state_dict({"down.weight": torch.tensor([[1.0, 2.0]]), "up.weight": torch.tensor([[1.0], [-0.5]])})
    h = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    output = lora(torch.tensor([[[10.0, 10.0]]], dtype=torch.float64), Context(h, None, None))
    torch.testing.assert_close(output, torch.tensor([[[10 + 16 * 11.0, 10 - 16 * 5.5]]], dtype=torch.float64))


def test_lora_starts_normal_and_zero():
    lora = make_adapters(BertConfig(num_hidden_layers=1), ["sst"], ("lora",), seeded()).layers[0]["sst"]
    assert [site for site in SITES if len(lora[site])] == ["query", "value"]
    module = lora["query"]["lora"]
    assert module.down.weight.shape == (LORA_RANK, 768) and module.up.weight.shape == (768, LORA_RANK)
    assert module.down.weight.std().item() == pytest.approx(0.02, rel=0.05) and not module.up.weight.any()
    assert module.scale == LORA_ALPHA / LORA_RANK == 2


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize("encoding", ["concat", "embed_concat", "siamese"])
def test_lora_equals_merged_weights(encoding, attention):
    """A model whose query and value weights are W + (alpha / r) B A gives the same logits, for every encoding."""
    tasks = build_tasks(pairs={"para": encoding, "sts": encoding})
    model = adapt(make_model(tasks, attention=attention, with_exits=True), ("lora",), random=True)
    for name in tasks:
        merged = make_model(tasks, attention=attention, with_exits=True)
        for i, layer in enumerate(merged.bert.bert_layers):
            merge(layer.self_attention, model.adapters.layers[i][name])
        batch, exits = make_batch(tasks[name]), (1, 2, 3)
        ours, expected = model(batch, exits=exits).logits, merged(batch, exits=exits).logits
        plain = make_model(tasks, attention=attention, with_exits=True)(batch, exits=exits).logits
        for i in exits:
            torch.testing.assert_close(ours[i], expected[i], rtol=1e-10, atol=1e-10)
            assert not torch.allclose(ours[i], plain[i])


def test_lora_has_the_gradients_of_merged_weights():
    """dL/dB = s (dL/dW) A^T and dL/dA = s B^T (dL/dW), with s = alpha / r and W the merged weights."""
    model = adapt(make_model(), ("lora",), random=True)
    merged = make_model()
    for i, layer in enumerate(merged.bert.bert_layers):
        merge(layer.self_attention, model.adapters.layers[i]["sts"])
    for each in (model, merged):
        losses(each, make_batch(each.tasks["sts"])).backward()
    for i, layer in enumerate(merged.bert.bert_layers):
        for site in ("query", "value"):
            gradient = getattr(layer.self_attention, site).weight.grad
            lora = model.adapters.layers[i]["sts"][site]["lora"]
            expected = lora.scale * gradient @ lora.down.weight.T
            torch.testing.assert_close(lora.up.weight.grad, expected, rtol=1e-9, atol=1e-12)
            expected = lora.scale * lora.up.weight.T @ gradient
            torch.testing.assert_close(lora.down.weight.grad, expected, rtol=1e-9, atol=1e-12)


# ---- what trains -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=NAMES)
def test_only_the_stated_parameters_move(kinds):
    """Two steps on all tasks: every adapter, head and exit moves, of BERT nothing or (Houlsby) the LayerNorms."""
    model = adapt(make_model(layers=2, with_exits=True), kinds)
    before = snapshot(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained_with(name, kinds))
    # the LTE has a loss term of its own, which is not among these losses
    named = [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith("lte.")]
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses(model, make_batch(task)) for task in model.tasks.values()).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in trained)
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {name for name in before if name.startswith(("adapters.", "heads.", "exits."))}
    if "houlsby" in kinds:
        of_a_layer = ("attention_layer_norm", "out_layer_norm")
        norms = ["bert.embed_layer_norm"] + [f"bert.bert_layers.{i}.{norm}" for i in (0, 1) for norm in of_a_layer]
        expected |= {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}
    assert moved == expected


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=NAMES)
def test_training_one_task_leaves_the_adapters_of_others_alone(kinds):
    model = adapt(make_model(), kinds, random=True)
    before = snapshot(model)
    batch = make_batch(model.tasks["sts"])
    answer = model(batch).logits[3]
    losses(model, make_batch(model.tasks["sst"])).backward()
    for name, parameter in model.adapters.named_parameters():
        assert (parameter.grad is not None) == (".sst." in f".{name}"), name
    torch.optim.AdamW(model.adapters.parameters(), lr=0.1).step()
    for name, parameter in model.adapters.named_parameters():
        assert torch.equal(parameter, before[f"adapters.{name}"]) == (".sst." not in f".{name}"), name
    assert torch.equal(model(batch).logits[3], answer)


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=NAMES)
def test_autocast_trains_with_finite_gradients(kinds):
    model = adapt(make_model(dtype=torch.float32), kinds, random=True, dtype=torch.float32)
    batch = make_batch(model.tasks["para"])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
    batch.task.objective.loss(outputs.logits[3].float(), batch.labels).sum().backward()
    of_task = [p for name, p in model.adapters.named_parameters() if ".para." in f".{name}"]
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() and p.grad.any() for p in of_task)


# ---- within the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=NAMES)
def test_padding_changes_nothing(kinds):
    """Neither more padding nor other tokens under the mask change an answer, a PAL's attention included."""
    model = adapt(make_model(), kinds, random=True)
    batch = make_batch(model.tasks["sst"])
    ((ids, mask, types),) = batch.segments
    wider = [nn.functional.pad(tensor, (0, 5)) for tensor in (ids, mask, types)]
    noisy = torch.where(wider[1] == 1, wider[0], 7)
    expected = model(batch).logits[3]
    padded = replace(batch, segments=((noisy, wider[1], wider[2]),))
    torch.testing.assert_close(model(padded).logits[3], expected, rtol=1e-10, atol=1e-10)
    unmasked = replace(batch, segments=((noisy, torch.ones_like(noisy), wider[2]),))
    assert not torch.allclose(model(unmasked).logits[3], expected)


def test_without_a_task_the_layers_are_plain():
    model = make_model()
    ((ids, mask, types),) = make_batch(model.tasks["sst"]).segments
    plain = model.bert(ids, mask, types)["last_hidden_state"]
    adapt(model, ("houlsby", "lhuc"), random=True)
    assert torch.equal(model.bert(ids, mask, types)["last_hidden_state"], plain)


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=NAMES)
def test_save_and_load_through_safetensors(kinds, tmp_path):
    """Every parameter is registered once, under the model's `adapters`; a loaded model answers the same."""
    model = adapt(make_model(), kinds, random=True)
    assert not any("adapter" in name for name in model.bert.state_dict())
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = adapt(make_model(seed=9), kinds)
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    batch = make_batch(model.tasks["para"])
    assert torch.equal(loaded(batch).logits[3], model(batch).logits[3])


def test_parameter_names_start_with_their_layer():
    model = adapt(make_model(layers=2), ("pal", "lhuc"))
    names = {name for name, _ in model.named_parameters() if name.startswith("adapters.") and ".sts." in name}
    of_layer = ["feed_forward.pal.query.weight", "feed_forward.pal.key.weight", "feed_forward.pal.value.weight"]
    expected = {f"adapters.layers.{i}.sts.{name}" for i in (0, 1) for name in (*of_layer, "output.lhuc.r")}
    assert names == expected | {"adapters.shared.sts.encoder.weight", "adapters.shared.sts.decoder.weight"}


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=NAMES)
def test_functional_call_uses_the_given_parameters(kinds):
    """A teacher's parameters, handed to functional_call, act in the slots too and leave the model as it was."""
    model = adapt(make_model(), kinds)
    teacher = adapt(make_model(), kinds, random=True)
    batch = make_batch(model.tasks["sst"])
    own, expected = model(batch).logits[3], teacher(batch).logits[3]
    given = torch.func.functional_call(model, dict(teacher.named_parameters()), (batch,)).logits[3]
    assert torch.equal(given, expected) and not torch.equal(given, own)
    assert torch.equal(model(batch).logits[3], own)


def test_a_copy_of_the_model_has_adapters_of_its_own():
    model = adapt(make_model(), ("houlsby",), random=True)
    batch = make_batch(model.tasks["sst"])
    expected = model(batch).logits[3]
    twin = copy.deepcopy(model)
    for parameter in model.adapters.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin(batch).logits[3], expected)
    assert not torch.equal(model(batch).logits[3], expected)


# ---- the registry and the record -------------------------------------------------------------------------


class Shift(nn.Module):
    """A kind from outside: add a learned vector."""

    def __init__(self, d):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(d))

    def forward(self, output, context):
        assert output.shape == context.h.shape and context.extended_mask.dim() == 4
        return output + self.vector


def test_a_kind_from_outside_needs_one_entry(monkeypatch):
    """It sits at its places, draws, counts and trains like the others, with lhuc after it, and is a choice."""
    monkeypatch.setitem(KINDS, "shift", Kind(("key", "output"), lambda config, generator: Shift(16)))
    model = make_model()
    batch = make_batch(model.tasks["para"])
    plain = model(batch).logits[3]
    adapt(model, ("shift", "lhuc"))
    assert torch.equal(model(batch).logits[3], plain)
    assert list(model.adapters.layers[0]["para"]["output"]) == ["shift", "lhuc"]
    counted = [p.numel() for name, p in model.adapters.named_parameters() if "para" in name and "shift" in name]
    assert sum(counted) == 3 * 2 * 16
    losses(model, batch).backward()
    gradients = [p.grad for name, p in model.adapters.named_parameters() if "para.output.shift" in name]
    assert len(gradients) == 3 and all(gradient.any() for gradient in gradients)
    assert not trained_with("bert.embed_layer_norm.weight", ("shift",))
    group = argparse.ArgumentParser()
    ADAPTERS.add_flags(group)
    assert group.parse_args(["--adapter", "shift", "lhuc"]).adapter == ["shift", "lhuc"]


def complaints(*adapter, option="finetune", train_backbone=False):
    """The sentences that the record gives against these flags."""
    flags = {"adapter": list(adapter), "option": option, "train_backbone": train_backbone}
    return [sentence for applies, sentence in ADAPTERS.conflicts(flags, set()) if applies]


def test_combinations_without_sense_are_refused():
    for allowed in (("none",), ("lora",), ("pal", "lhuc"), ("lhuc", "lora"), ("lhuc",)):
        assert not complaints(*allowed)
    assert not complaints("pal", train_backbone=True) and not complaints("none", option="pretrain")
    for adapter, words in ((("none", "pal"), "none"), (("pal", "lora"), "lhuc"), (("before", "after", "lhuc"), "lhuc")):
        assert any(words in sentence for sentence in complaints(*adapter))
    assert "--train_backbone" in complaints("none", train_backbone=True)[0]
    assert "--option finetune" in complaints("lora", option="pretrain")[0]


def test_the_record_builds_nothing_when_off():
    flags = {"adapter": ["none"], "train_backbone": False}
    assert ADAPTERS.adapters(flags, make_config(), ["sst"], None) is None
    assert ADAPTERS.trains(flags, make_model()) is None


def test_the_record_builds_the_adapters_and_freezes_the_backbone():
    model = make_model()
    flags = {"adapter": ["lora"], "train_backbone": False}
    model.adapters = ADAPTERS.adapters(flags, model.bert.config, list(model.tasks), seeded())
    expected = {name for name, _ in model.named_parameters() if name.startswith(("adapters.", "heads."))}
    assert ADAPTERS.trains(flags, model) == expected
    assert ADAPTERS.trains(flags | {"train_backbone": True}, model) is None


@pytest.mark.parametrize("kinds", [None, ("lora", "lhuc"), ("pal",), ("houlsby",)], ids=str)
def test_compiled_layers_share_one_translation_and_compute_the_same(kinds):
    """A layer receives a new function for its adapters at every step: that alone must not translate it again.

    One translation serves all layers, tasks, batch sizes and lengths, and yet each task uses its own adapters.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = make_model(with_exits=True), make_model(with_exits=True)
    for model in (plain, compiled):
        if kinds:
            adapt(model, kinds, random=True)
    for layer in compiled.bert.bert_layers:
        layer.compile(dynamic=True, backend="eager")
    for step in range(4):
        for model in (plain, compiled):
            model.zero_grad()
            for task in model.tasks.values():
                losses(model, make_batch(task, b=3 + step, s=9 + step)).backward()
        for ours, expected in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
