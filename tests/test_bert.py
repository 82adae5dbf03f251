"""BERT against transformers, golden values and hand-worked properties.

Only the tests of an inner function use its name: a BERT written differently fails those tests and no others.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from make_bert_golden import SIZES as GOLDEN_SIZES

import base_bert
import bert
from base_bert import BertConfig, hub_name
from bert import BertModel
from errors import InputError
from tokenizer import BertTokenizer
from weights import WEIGHTS_FOLDER

MINILM = WEIGHTS_FOLDER / "all-MiniLM-L6-v2"
needs_minilm = pytest.mark.skipif(not (MINILM / "model.safetensors").is_file(), reason="run ./setup.sh first")
GOLDEN = Path(__file__).parent / "golden" / "bert.npz"

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
}
ODD = {
    "vocab_size": 37,
    "hidden_size": 21,
    "num_hidden_layers": 3,
    "num_attention_heads": 7,
    "intermediate_size": 13,
    "max_position_embeddings": 11,
    "type_vocab_size": 3,
}
DEEP = TINY | {
    "hidden_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 384,
}

FIRST = ["the ferry was late, but nobody minded the sunset.", "Why?", "a dull, endless film about paint"]
SECOND = [
    "Nobody on the boat complained.",
    "because the kettle boiled over twice this morning",
    "Paint dries.",
]


@pytest.fixture(autouse=True)
def same_start():
    """Start every test from one state of the global generator, on one thread: its tensors are small."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_batch(config, lengths=(9, 4, 7), types=2):
    """Draw a padded batch: input_ids, mask, types, each [b,s]."""
    s = max(lengths)
    mask = (torch.arange(s) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(1, config.vocab_size, mask.shape) * mask
    return input_ids, mask, torch.randint(0, types, mask.shape)


def tiny_model(attention="plain", **values):
    """Make a tiny model, float64, in evaluation, with weights so large that every part matters."""
    config = BertConfig(**TINY | {"initializer_range": 0.3} | values)
    return BertModel(config, attention, torch.Generator().manual_seed(1)).double().eval()


def hub_pair(folder, **values):
    """Make a random model with transformers, save it, load it with ours: (theirs, ours), float64."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(initializer_range=0.2, **values)
    theirs = transformers.BertModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs.double(), BertModel.from_pretrained(folder).double().eval()


def run_ours(model, input_ids, mask, types):
    """Give all hidden states, embeddings first, and the pooled vector."""
    states = [model.embed(input_ids, types)]
    states += [h for _, h in model.encode(states[0], mask)]
    return states, model.pool(states[-1])


def backward(last_hidden_state, pooler_output, mask):
    """Run backward from a fixed, uneven mixture of a model's outputs at the tokens that are no padding."""
    generator = torch.Generator().manual_seed(2)
    loss = 0
    for output, weight in ((last_hidden_state, mask[..., None]), (pooler_output, 1)):
        mixture = torch.randn(output.shape, generator=generator).to(output.dtype)
        loss = loss + (output * mixture * weight).mean()
    loss.backward()


def assert_same_model(theirs, ours, batch, tolerance):
    """Compare each hidden state, the pooled vector, and the gradient of each parameter."""
    input_ids, mask, types = batch
    theirs.zero_grad()
    ours.zero_grad()
    expected = theirs(input_ids, mask, types, output_hidden_states=True)
    states, pooled = run_ours(ours, *batch)
    assert len(states) == len(expected.hidden_states)
    for h, expected_h in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(h, expected_h, atol=tolerance, rtol=0)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=tolerance, rtol=0)
    output = ours(*batch)
    assert torch.equal(output["last_hidden_state"], states[-1])
    assert torch.equal(output["pooler_output"], pooled)

    backward(expected.last_hidden_state, expected.pooler_output, mask)
    backward(output["last_hidden_state"], output["pooler_output"], mask)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected_gradient = gradients.pop(hub_name(name))
        torch.testing.assert_close(parameter.grad, expected_gradient, atol=tolerance, rtol=0)
    assert not gradients


@pytest.mark.parametrize("sizes", [TINY, ODD, DEEP], ids=["tiny", "odd", "deep"])
def test_random_model_equals_transformers(tmp_path, sizes):
    theirs, ours = hub_pair(tmp_path, **sizes)
    batch = random_batch(ours.config, types=sizes["type_vocab_size"])
    assert_same_model(theirs, ours, batch, 1e-9)


@pytest.mark.parametrize("hidden_act", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_other_activations_equal_transformers(tmp_path, hidden_act):
    theirs, ours = hub_pair(tmp_path, **TINY, hidden_act=hidden_act, layer_norm_eps=1e-3, pad_token_id=3)
    assert_same_model(theirs, ours, random_batch(ours.config), 1e-9)


@pytest.fixture(scope="module")
def minilm():
    """Load the real small weights once: (tokenizer, model)."""
    return BertTokenizer.from_pretrained(MINILM), BertModel.from_pretrained(MINILM).eval()


@needs_minilm
def test_minilm_equals_transformers(minilm):
    transformers = pytest.importorskip("transformers")
    tokenizer, ours = minilm
    theirs = transformers.BertModel.from_pretrained(MINILM, attn_implementation="eager").eval()
    for count in (1, 3):
        encoding = tokenizer(FIRST[:count], SECOND[:count])
        batch = encoding["input_ids"], encoding["attention_mask"], encoding["token_type_ids"]
        assert batch[2].any() and bool(batch[1].all()) is (count == 1)
        assert_same_model(theirs, ours, batch, 1e-4)


def test_golden_values(tmp_path):
    """The file holds a random model of transformers, and its results; tests/make_bert_golden.py wrote it."""
    golden = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    weights = {name.removeprefix("weight."): golden[name] for name in golden if name.startswith("weight.")}
    BertConfig(**GOLDEN_SIZES).to_json(tmp_path / "config.json")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    model = BertModel.from_pretrained(tmp_path).double().eval()
    states, pooled = run_ours(model, golden["input_ids"], golden["mask"], golden["types"])
    for i, h in enumerate(states):
        torch.testing.assert_close(h, golden[f"hidden.{i}"], atol=1e-9, rtol=0)
    torch.testing.assert_close(pooled, golden["pooler_output"], atol=1e-9, rtol=0)
    (pooled.sum() + states[-1].square().sum()).backward()
    for name, parameter in model.named_parameters():
        expected = golden[f"gradient.{hub_name(name)}"]
        torch.testing.assert_close(parameter.grad.float(), expected, atol=1e-4, rtol=1e-5)


def test_sdpa_equals_plain():
    plain, sdpa = tiny_model("plain"), tiny_model("sdpa")
    sdpa.load_state_dict(plain.state_dict())
    batch = random_batch(plain.config)
    for model in (plain, sdpa):
        model.result = model(*batch)
        backward(model.result["last_hidden_state"], model.result["pooler_output"], batch[1])
    for name, expected in plain.result.items():
        torch.testing.assert_close(sdpa.result[name], expected, atol=1e-10, rtol=0)
    for a, b in zip(plain.parameters(), sdpa.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_attention_dropout_acts_in_training_only(attention):
    model = tiny_model(attention, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    batch = random_batch(model.config)
    still = model(*batch)["last_hidden_state"]
    assert torch.equal(still, model(*batch)["last_hidden_state"])
    model.train()
    assert not torch.allclose(still, model(*batch)["last_hidden_state"])


def test_hidden_dropout_acts_at_each_site_in_training():
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    batch = random_batch(model.config)
    still = model(*batch)["last_hidden_state"]
    assert torch.equal(still, model(*batch)["last_hidden_state"])
    layer = model.bert_layers[1]
    for dropout in (model.embed_dropout, layer.attention_dropout, layer.out_dropout):
        dropout.p = 0.5
        assert not torch.allclose(still, model(*batch)["last_hidden_state"])
        dropout.p = 0.0


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_padding_changes_nothing(attention):
    model = tiny_model(attention).float()
    input_ids, mask, types = random_batch(model.config)
    input_ids[mask == 0] = 7  # whatever stands in the padding must not matter
    together = model(input_ids, mask, types)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(*(x[row : row + 1, :length] for x in (input_ids, mask, types)))
        h = together["last_hidden_state"][row, :length]
        torch.testing.assert_close(h, alone["last_hidden_state"][0], atol=1e-5, rtol=0)
        pooled = together["pooler_output"][row]
        torch.testing.assert_close(pooled, alone["pooler_output"][0], atol=1e-5, rtol=0)


@needs_minilm
def test_padding_changes_nothing_with_real_weights(minilm):
    tokenizer, model = minilm
    with torch.no_grad():
        together = model(**tokenizer(FIRST, SECOND))["pooler_output"]
        for row in range(len(FIRST)):
            alone = model(**tokenizer(FIRST[row : row + 1], SECOND[row : row + 1]))["pooler_output"]
            torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_of_padding_stays_finite(attention, dtype):
    model = tiny_model(attention).to(dtype)
    input_ids, mask, types = random_batch(model.config)
    mask[1] = 0
    extended_mask = model.extend_mask(mask, dtype)
    assert extended_mask.dtype == dtype and extended_mask.shape == (3, 1, 1, 9)
    assert extended_mask.isfinite().all()
    assert torch.softmax(extended_mask[2, 0, 0], -1)[7:].eq(0).all()
    output = model(input_ids, mask, types)
    assert output["last_hidden_state"].isfinite().all()
    backward(output["last_hidden_state"], output["pooler_output"], mask)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_autocast_trains_in_bfloat16(attention):
    model = tiny_model(attention).float().train()
    batch = random_batch(model.config)
    batch[1][1] = 0
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*batch)
        backward(output["last_hidden_state"], output["pooler_output"], batch[1])
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
    model.eval()
    with torch.no_grad():
        expected = model(*batch)["last_hidden_state"][0]
        with torch.autocast("cpu", torch.bfloat16):
            h = model(*batch)["last_hidden_state"][0]
    assert h.dtype == torch.float32
    assert 0 < (h - expected).abs().max() < 0.1


def test_attention_is_as_narrow_as_its_scores_under_autocast():
    """A float32 mask must not widen the attention weights, the largest tensor of a layer."""
    query, key, value = torch.randn(3, 2, 4, 5, 8).bfloat16()
    mask = torch.zeros(2, 1, 1, 5)
    mask[:, :, :, -1] = -1e4
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        bert.attend_plain(query, key, value, mask, lambda weights: seen.append(weights) or weights)
    [weights] = seen
    assert weights.dtype == torch.bfloat16 and (weights[..., -1] == 0).all()
    expected = torch.softmax(query[..., :].float() @ key[..., :-1, :].float().transpose(-1, -2) / 8**0.5, dim=-1)
    assert torch.allclose(weights[..., :-1].float(), expected, atol=0.02)


def test_segments_and_positions_matter_and_segments_default_to_the_first():
    model = tiny_model()
    input_ids, mask, _ = random_batch(model.config, lengths=(6,))
    h = model.embed(input_ids)
    assert torch.equal(h, model.embed(input_ids, torch.zeros_like(input_ids)))
    assert not torch.allclose(h, model.embed(input_ids, torch.ones_like(input_ids)))
    assert not torch.allclose(h.flip(1), model.embed(input_ids.flip(1)))


def test_too_long_a_text_is_refused():
    model = tiny_model()
    model.embed(torch.ones(1, 20, dtype=torch.long))
    with pytest.raises(InputError, match="21 tokens.*20"):
        model.embed(torch.ones(1, 21, dtype=torch.long))


def test_encode_starts_and_stops_where_it_is_told():
    model = tiny_model(num_hidden_layers=4)
    input_ids, mask, types = random_batch(model.config)
    h = model.embed(input_ids, types)
    states = dict(model.encode(h, mask))
    assert list(states) == [1, 2, 3, 4]
    part = dict(model.encode(states[1], mask, start=1, stop=3))
    assert list(part) == [2, 3]
    assert torch.equal(part[2], states[2]) and torch.equal(part[3], states[3])
    assert list(model.encode(h, mask, start=2, stop=2)) == []


SITES = ["query", "key", "value", "attention", "feed_forward", "output"]


def test_adapter_sees_each_site_and_replaces_its_output():
    """With both sub-layers' outputs made 0 a layer is two LayerNorms of its input; the last is doubled."""
    model = tiny_model()
    input_ids, mask, types = random_batch(model.config)
    h = model.embed(input_ids, types)
    plain = dict(model.encode(h, mask))
    layers, sites = [], []

    def make_adapt(layer_index, task, layer_input, extended_mask):
        assert layer_input is h and extended_mask.shape == (3, 1, 1, 9)
        layers.append((layer_index, task))

        def adapt(site, output):
            assert output.shape == h.shape
            sites.append(site)
            if site in ("attention", "feed_forward"):
                return torch.zeros_like(output)
            return 2 * output if site == "output" else output

        return adapt

    model.make_adapt = make_adapt
    layer = model.bert_layers[1]
    adapted = dict(model.encode(h, mask, task_name="sst", start=1))[2]
    assert layers == [(1, "sst")] and sites == SITES
    assert torch.equal(adapted, 2 * layer.out_layer_norm(layer.attention_layer_norm(h)))

    # without a task nothing is adapted, and an adapter may return what it gets
    assert torch.equal(dict(model.encode(h, mask))[2], plain[2])
    assert torch.equal(model(input_ids, mask, types)["last_hidden_state"], plain[2])
    model.make_adapt = lambda *_: bert.unchanged
    assert torch.equal(dict(model.encode(h, mask, "sst"))[2], plain[2])


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_adapted_projections_equal_a_model_with_such_weights(attention):
    """An adapter may add a linear map of h to a projection: the same as adding its matrix to the weights."""
    model, merged = tiny_model(attention), tiny_model(attention)
    batch = random_batch(model.config)
    extra = {site: torch.randn(16, 16, dtype=torch.float64) for site in SITES[:3]}

    def make_adapt(layer_index, task, h, extended_mask):
        return lambda site, output: output + h @ extra[site].T if site in extra else output

    model.make_adapt = make_adapt
    with torch.no_grad():
        for layer in merged.bert_layers:
            for site, matrix in extra.items():
                getattr(layer.self_attention, site).weight.add_(matrix)
    h = model.embed(batch[0], batch[2])
    for (i, ours), (j, expected) in zip(model.encode(h, batch[1], "sst"), merged.encode(h, batch[1]), strict=True):
        assert i == j
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)


def test_course_parameter_names():
    names = set(tiny_model().state_dict())
    for name in (
        "word_embedding.weight",
        "pos_embedding.weight",
        "tk_type_embedding.weight",
        "embed_layer_norm.bias",
        "bert_layers.1.self_attention.query.weight",
        "bert_layers.1.attention_dense.bias",
        "bert_layers.1.out_layer_norm.weight",
        "pooler_dense.weight",
    ):
        assert name in names
    assert len(names) == 5 + 2 + 2 * 16


def test_initialisation_follows_the_generator_and_the_configured_spread():
    config = dataclasses.replace(tiny_model().config, hidden_size=64, intermediate_size=512)
    models = [BertModel(config, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[1].state_dict()[name])
        if name.endswith("bias"):
            assert not weight.any()
        elif "layer_norm" in name:
            assert weight.eq(1).all()
        else:
            assert not torch.equal(weight, models[2].state_dict()[name])
            assert abs(weight.mean()) < 5 * 0.3 / weight.numel() ** 0.5
            assert abs(weight.std() / 0.3 - 1) < 5 / weight[weight != 0].numel() ** 0.5 + 0.02
    assert not models[0].word_embedding.weight[config.pad_token_id].any()


def test_dropout_statistics():
    """Each of the four numbers cut from one draw is kept with one chance, independently of the others."""
    p, draws = 0.1, 400_000
    dropped = round(p * base_bert.LEVELS)
    values = bert.Dropout(p)(torch.ones(draws, 4, dtype=torch.float64))
    assert set(values.unique().tolist()) == {0.0, base_bert.LEVELS / (base_bert.LEVELS - dropped)}
    kept = (values != 0).double()
    chance = 1 - dropped / base_bert.LEVELS
    deviation = (chance * (1 - chance) / draws) ** 0.5
    assert (kept.mean(0) - chance).abs().max() < 5 * deviation
    correlation = torch.corrcoef(torch.cat([kept[1:], kept[:-1]], 1).T)
    assert (correlation - torch.eye(8, dtype=torch.float64)).abs().max() < 5 / draws**0.5


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_passes_the_gradient_through_the_kept(p):
    x = torch.full((999, 333), 2.0, requires_grad=True)
    output = bert.Dropout(p)(x)
    assert abs(output.mean() / 2 - 1) < 5 * (p / (1 - p) / x.numel()) ** 0.5
    output.sum().backward()
    assert torch.equal(2 * x.grad, output)


def test_dropout_replays_from_the_generator_state():
    dropout, x = bert.Dropout(0.5), torch.randn(7, 3, 5)
    state = torch.get_rng_state()
    first, second = dropout(x), dropout(x)
    torch.set_rng_state(state)
    assert torch.equal(first, dropout(x)) and torch.equal(second, dropout(x))
    assert not torch.equal(first, second)


def test_each_kind_of_device_has_its_own_generator_for_dropout(monkeypatch):
    """On a GPU dropout draws there: the CPU's state saved and put back would replay other masks."""
    called = []
    for kind in ("cuda", "mps"):
        source = getattr(torch, kind)
        monkeypatch.setattr(source, "get_rng_state", lambda *place, kind=kind: called.append((kind, "get", *place)))
        monkeypatch.setattr(
            source, "set_rng_state", lambda state, kind=kind, **place: called.append((kind, "set", *place.values()))
        )
    for name in ("cuda:1", "mps"):
        get_state, set_state = base_bert.dropout_state(torch.device(name))
        set_state(get_state())
    first = torch.device("cuda:1")
    assert called == [("cuda", "get", first), ("cuda", "set", first), ("mps", "get"), ("mps", "set")]
    assert base_bert.dropout_state(torch.device("cpu")) == (torch.get_rng_state, torch.set_rng_state)


def test_dropout_is_the_identity_in_evaluation_and_at_zero():
    x = torch.randn(3, 5)
    assert bert.Dropout(0.5).eval()(x) is x
    assert bert.Dropout(0.0)(x) is x
    # a rate that rounds to 1 still leaves a number to scale
    assert torch.isfinite(bert.Dropout(0.9999999)(x)).all()


def test_dropout_takes_any_number_of_elements_in_any_layout():
    for shape in ((0, 4), (1, 1), (3, 5), (2, 3)):
        x = torch.ones(shape, dtype=torch.bfloat16).T
        output = bert.Dropout(0.5)(x)
        assert output.shape == x.shape and output.dtype == x.dtype
