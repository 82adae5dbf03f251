"""Finding, loading, refusing and saving weights, and the pooling that they were trained with."""

import hashlib
import json
import os
import pickle
import shutil
import zipfile

import pytest
import safetensors.torch
import torch

import weights
from base_bert import BertConfig, hub_name
from bert import BertModel
from errors import InputError
from weights import WEIGHTS_FOLDER, find_weights, pooling_of

SIZES = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}
QUERY = "encoder.layer.1.attention.self.query.weight"


def small_model():
    """Make a random model with nothing left at 0 or 1."""
    generator = torch.Generator().manual_seed(5)
    model = BertModel(BertConfig(**SIZES), generator=generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def folder(tmp_path):
    """Make a complete folder in the hub's layout."""
    path = tmp_path / "model"
    small_model().save_pretrained(path)
    (path / "vocab.txt").write_text("".join(f"token{i}\n" for i in range(SIZES["vocab_size"])))
    return path


def hub_tensors():
    """Give the small model's tensors under the hub's names."""
    return {hub_name(name): tensor.clone() for name, tensor in small_model().state_dict().items()}


def use_bin(folder, content):
    """Replace the folder's weights by a pytorch_model.bin with this content."""
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def use_tensors(folder, tensors):
    """Replace the folder's weights by these tensors."""
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def change_config(folder, **values):
    """Set (or, with None, remove) keys of the folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def assert_loads(folder):
    """Check that the folder holds the small model, bit for bit."""
    loaded = BertModel.from_pretrained(folder).state_dict()
    expected = small_model().state_dict()
    assert list(loaded) == list(expected)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == torch.float32


def assert_refused(call, *words):
    """Check that a call ends in an InputError of one line that holds these words."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def assert_folder_refused(folder, *words):
    """Check that loading the folder ends in an InputError of one line that holds these words."""
    assert_refused(lambda: BertModel.from_pretrained(folder), *words)


# ---- the configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "swish"),
        ("hidden_act", ["gelu"]),
        ("position_embedding_type", "relative_key"),
        ("model_type", "roberta"),
        ("is_decoder", True),
        ("hidden_size", 0),
        ("hidden_size", -12),
        ("hidden_size", 12.0),
        ("hidden_size", "12"),
        ("num_hidden_layers", True),
        ("hidden_dropout_prob", 1.0),
        ("hidden_dropout_prob", -0.1),
        ("attention_probs_dropout_prob", "0.1"),
        ("layer_norm_eps", 0),
        ("layer_norm_eps", float("nan")),
        ("initializer_range", -0.02),
        ("pad_token_id", 30),
    ],
)
def test_config_refuses(folder, key, value):
    change_config(folder, **{key: value})
    path = folder / "config.json"
    assert_refused(lambda: BertConfig.from_json(path), str(path), key, repr(value))


@pytest.mark.parametrize("key", SIZES)
def test_config_refuses_a_missing_size(folder, key):
    change_config(folder, **{key: None})
    assert_folder_refused(folder, "config.json", key, "missing")


def test_config_refuses_heads_that_do_not_divide(folder):
    change_config(folder, num_attention_heads=5)
    assert_folder_refused(folder, "config.json", "hidden_size 12", "num_attention_heads 5")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"bert"'])
def test_config_refuses_what_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text)
    assert_folder_refused(folder, str(folder / "config.json"), "get it again")


def test_config_ignores_other_keys_and_survives_a_round_trip(folder):
    change_config(folder, gradient_checkpointing=False, hidden_dropout_prob=0.25, classifier_dropout="x")
    config = BertConfig.from_json(folder / "config.json")
    assert config == BertConfig(**SIZES, hidden_dropout_prob=0.25)
    config.to_json(folder / "again.json")
    assert BertConfig.from_json(folder / "again.json") == config
    assert json.loads((folder / "again.json").read_text())["model_type"] == "bert"


# ---- what loads ------------------------------------------------------------------------------------------


def test_hub_tensor_names_of_any_age_load(folder):
    tensors = {}
    for name, tensor in hub_tensors().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors["bert." + name] = tensor
    tensors["cls.predictions.bias"] = torch.full((30,), 9.0)
    tensors["cls.predictions.transform.LayerNorm.gamma"] = torch.full((12,), 9.0)
    tensors["cls.seq_relationship.weight"] = torch.full((2, 12), 9.0)
    tensors["bert.embeddings.position_ids"] = torch.arange(16)[None]
    use_tensors(folder, tensors)
    assert_loads(folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_bin_file_loads(folder, zipped):
    path = use_bin(folder, None)
    torch.save(hub_tensors(), path, _use_new_zipfile_serialization=zipped)
    assert_loads(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_parts_load(folder, kind):
    write_parts(folder, kind)
    assert_loads(folder)


def write_parts(folder, kind):
    """Replace the folder's weights by two parts and an index; return the index's path."""
    (folder / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    tensors, weight_map = hub_tensors(), {}
    names = list(tensors)
    for part, chosen in enumerate((names[:7], names[7:]), start=1):
        file = f"{stem}-0000{part}-of-00002.{kind}"
        content = {name: tensors[name] for name in chosen}
        (safetensors.torch.save_file if kind == "safetensors" else torch.save)(content, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    path = folder / f"{stem}.{kind}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def test_half_precision_weights_become_float32(folder):
    halves = {name: tensor.half() for name, tensor in hub_tensors().items()}
    use_tensors(folder, halves)
    loaded = BertModel.from_pretrained(folder)
    assert loaded.word_embedding.weight.dtype == torch.float32
    assert torch.equal(loaded.word_embedding.weight, halves["embeddings.word_embeddings.weight"].float())


def test_a_missing_pooler_is_said_and_drawn_from_the_generator(folder, capsys):
    tensors = {name: tensor for name, tensor in hub_tensors().items() if not name.startswith("pooler")}
    use_tensors(folder, tensors)
    poolers = [BertModel.from_pretrained(folder).pooler_dense for _ in range(2)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "no pooler" in said[0] and str(folder) in said[0]
    assert torch.equal(poolers[0].weight, poolers[1].weight)
    assert 0.01 < poolers[0].weight.std() < 0.03 and not poolers[0].bias.any()
    other = BertModel.from_pretrained(folder, generator=torch.Generator().manual_seed(9)).pooler_dense
    assert not torch.equal(other.weight, poolers[0].weight)


def test_loading_draws_nothing_from_the_global_generator(folder, capsys):
    state = torch.get_rng_state()
    BertModel.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")


def test_loaded_weights_outlive_their_file(folder):
    model = BertModel.from_pretrained(folder)
    shutil.rmtree(folder)
    assert torch.equal(model.pooler_dense.weight, small_model().pooler_dense.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [QUERY, "pooler.dense.bias", "embeddings.LayerNorm.weight"])
def test_refuses_a_missing_tensor(folder, name):
    tensors = hub_tensors()
    del tensors[name]
    use_tensors(folder, tensors)
    assert_folder_refused(folder, "model.safetensors", name, "missing")


@pytest.mark.parametrize("name", ["classifier.weight", "encoder.layer.2.output.dense.bias", "bert.adapter"])
def test_refuses_an_unknown_tensor(folder, name):
    use_tensors(folder, hub_tensors() | {name: torch.ones(3)})
    assert_folder_refused(folder, "model.safetensors", name.removeprefix("bert."))


def test_refuses_a_tensor_under_two_names(folder):
    use_tensors(folder, hub_tensors() | {"bert.embeddings.LayerNorm.gamma": torch.ones(12)})
    assert_folder_refused(folder, "model.safetensors", "embeddings.LayerNorm", "two names")


def test_refuses_a_wrong_shape(folder):
    use_tensors(folder, hub_tensors() | {QUERY: torch.ones(12, 11)})
    assert_folder_refused(folder, "model.safetensors", QUERY, "[12, 11]", "[12, 12]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_numbers_that_are_not_finite(folder, value):
    tensors = hub_tensors()
    tensors[QUERY][3, 4] = value
    use_tensors(folder, tensors)
    assert_folder_refused(folder, "model.safetensors", QUERY, "NaN or infinity")


def test_refuses_integers(folder):
    use_tensors(folder, hub_tensors() | {QUERY: torch.ones(12, 12, dtype=torch.int8)})
    assert_folder_refused(folder, "model.safetensors", QUERY, "int8")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_refuses_a_safetensors_file_cut_short(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_folder_refused(folder, str(path), "get it again")


def test_refuses_a_pointer_in_place_of_the_file(folder):
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 440449768\n")
    assert_folder_refused(folder, str(path), "get it again")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("keep", [0, 5, 1000, -1, -2000])
def test_refuses_a_bin_file_cut_short(folder, zipped, keep):
    path = use_bin(folder, None)
    torch.save(hub_tensors(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:keep])
    assert_folder_refused(folder, str(path), "get it again")


class Touch:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_refuses_pickled_code_and_does_not_run_it(folder, tmp_path, kind):
    content = hub_tensors() | {"trap": Touch(tmp_path / "ran")}
    path = use_bin(folder, None)
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"trap": Touch(tmp_path / "ran")}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    assert_folder_refused(folder, str(path), "pickled code", "model.safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": {}}, {3: torch.ones(2)}, None])
def test_refuses_a_bin_file_that_is_no_state_dict(folder, content):
    path = use_bin(folder, content)
    assert_folder_refused(folder, str(path), "state_dict")


def test_refuses_another_zip_file(folder):
    path = use_bin(folder, None)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    assert_folder_refused(folder, str(path), "get it again")


@pytest.mark.parametrize("lines", [29, 31])
def test_refuses_a_vocabulary_of_another_size(folder, lines):
    (folder / "vocab.txt").write_text("word\n" * lines)
    assert_folder_refused(folder, "vocab.txt", str(lines), "30")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"])
def test_refuses_a_configuration_of_another_size(folder, key):
    (folder / "vocab.txt").unlink()
    change_config(folder, **{key: SIZES[key] + 3})
    assert_folder_refused(folder, "model.safetensors", "tensor", "has shape")


@pytest.mark.parametrize("layers", [1, 3])
def test_refuses_a_configuration_of_another_depth(folder, layers):
    change_config(folder, num_hidden_layers=layers)
    assert_folder_refused(folder, "model.safetensors", "encoder.layer.")


def test_refuses_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert_folder_refused(folder, str(folder), "model.safetensors or pytorch_model.bin")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_refuses_parts_that_are_incomplete(folder, kind):
    index = write_parts(folder, kind)
    part = sorted(folder.glob(f"*-00002.{kind}"))[1]
    content = part.read_bytes()
    part.unlink()
    assert_folder_refused(folder, index.name, part.name)
    part.write_bytes(content[:-1])
    assert_folder_refused(folder, str(part), "get it again")
    part.write_bytes(content)
    good = json.loads(index.read_text())
    for change, words in (
        (
            {"weight_map": good["weight_map"] | {"pooler.dense.extra": part.name}},
            ("pooler.dense.extra", "missing"),
        ),
        ({"weight_map": good["weight_map"] | {"x": "../model/" + part.name}}, ("../model/",)),
        ({"weight_map": {k: v for k, v in good["weight_map"].items() if k != QUERY}}, (QUERY, part.name)),
        ({"weight_map": [1]}, ("weight_map",)),
        ({}, ("weight_map",)),
    ):
        index.write_text(json.dumps(change))
        assert_folder_refused(folder, *words)


# ---- saving ----------------------------------------------------------------------------------------------


def test_save_keeps_weights_configuration_and_tokenizer_files(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "deep" / "copy")
    copy = tmp_path / "deep" / "copy"
    assert_loads(copy)
    assert sorted(os.listdir(copy)) == [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    for name in ("vocab.txt", "tokenizer_config.json"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
    assert find_weights(copy) == copy


def test_a_save_that_fails_leaves_the_folder_as_it_was(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = BertModel.from_pretrained(folder)
    model.pooler_dense.weight.data.zero_()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert_refused(lambda: model.save_pretrained(folder), str(folder), "No space left")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_save_refuses_a_model_with_an_adapter(tmp_path):
    model = small_model()
    model.adapters = torch.nn.Linear(12, 12)
    assert_refused(lambda: model.save_pretrained(tmp_path / "copy"), "adapters.weight", "take the adapter off")
    assert not (tmp_path / "copy").exists()


def test_transformers_loads_what_we_saved(folder):
    transformers = pytest.importorskip("transformers")
    theirs, loading = transformers.BertModel.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ours = small_model()
    input_ids = torch.tensor([[2, 9, 17, 4], [5, 3, 0, 0]])
    mask = (input_ids != 0).long()
    types = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])
    with torch.no_grad():
        expected = theirs.eval()(input_ids, mask, types)
        output = ours(input_ids, mask, types)
    for name, tensor in output.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


def test_we_load_what_transformers_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel(transformers.BertConfig(**SIZES))
    theirs.save_pretrained(tmp_path)
    ours = BertModel.from_pretrained(tmp_path)
    tensors = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, tensors[hub_name(name)])


# ---- finding ---------------------------------------------------------------------------------------------


def test_auto_takes_bert_base_where_it_is_complete_and_minilm_else(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "WEIGHTS_FOLDER", tmp_path / "weights")
    minilm, bert_base = tmp_path / "weights" / "all-MiniLM-L6-v2", tmp_path / "weights" / "bert-base-uncased"
    assert_refused(lambda: find_weights("auto"), "all-MiniLM-L6-v2", "config.json", "run ./setup.sh")
    shutil.copytree(folder, minilm)
    assert find_weights("auto") == find_weights("minilm") == find_weights("all-MiniLM-L6-v2") == minilm
    for name in ("bert-base", "bert-base-uncased"):
        assert_refused(lambda name=name: find_weights(name), "run ./setup.sh --bert-base")
    shutil.copytree(folder, bert_base)
    for name in ("auto", "bert-base", "bert-base-uncased"):
        assert find_weights(name) == bert_base
    (bert_base / "model.safetensors").unlink()
    assert find_weights("auto") == minilm


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "model.safetensors"])
def test_an_incomplete_folder_is_refused(folder, name):
    assert find_weights(str(folder)) == folder
    (folder / name).unlink()
    assert_refused(lambda: find_weights(folder), str(folder), name)


def test_an_absent_folder_is_refused(tmp_path):
    assert_refused(lambda: find_weights(tmp_path / "nothing"), str(tmp_path / "nothing"), "minilm")


def test_folders_in_each_format_are_found(folder):
    index = write_parts(folder, "bin")
    assert find_weights(folder) == folder
    index.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert find_weights(folder) == folder


def test_a_model_loads_by_a_known_name(folder, tmp_path, monkeypatch):
    """A course's script gives the hub's name; the program's folder of weights has it."""
    monkeypatch.setattr(weights, "WEIGHTS_FOLDER", tmp_path / "weights")
    assert_refused(lambda: BertModel.from_pretrained("bert-base-uncased"), "run ./setup.sh --bert-base")
    shutil.copytree(folder, tmp_path / "weights" / "bert-base-uncased")
    expected = small_model().state_dict()
    for name in ("bert-base-uncased", "bert-base"):
        loaded = BertModel.from_pretrained(name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())


# ---- pooling ---------------------------------------------------------------------------------------------


def write_pooling(folder, **modes):
    """Write the pooling file of sentence-transformers; the modes are True, all others False."""
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    values = {f"pooling_mode_{name}": modes.get(name, False) for name in names}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"word_embedding_dimension": 12, **values, "include_prompt": True}))
    return path


def test_pooling_is_read_from_the_folder(folder):
    path = write_pooling(folder, mean_tokens=True)
    assert pooling_of(folder) == ("mean", f"{path} sets mean pooling")
    write_pooling(folder, cls_token=True)
    assert pooling_of(folder) == ("cls", f"{path} sets cls pooling")


@pytest.mark.parametrize(
    ("mode", "expected"), [("mean", "mean"), ("cls", "cls"), ("max", None), (["cls", "mean"], None)]
)
def test_pooling_is_read_in_the_format_of_version_6(folder, mode, expected):
    path = write_pooling(folder)
    path.write_text(json.dumps({"embedding_dimension": 12, "pooling_mode": mode, "include_prompt": True}))
    pooling, reason = pooling_of(folder)
    assert pooling == (expected or "cls") and ("--pooling mean" in reason) == (expected is None)


def test_a_pooling_that_is_not_ours_decides_nothing(folder):
    for modes in ({}, {"max_tokens": True}, {"mean_tokens": True, "cls_token": True}):
        write_pooling(folder, **modes)
        pooling, reason = pooling_of(folder)
        assert pooling == "cls" and "--pooling mean" in reason


def test_a_damaged_pooling_file_is_refused(folder):
    path = write_pooling(folder)
    path.write_text("{")
    assert_refused(lambda: pooling_of(folder), str(path), "get it again")


def test_known_weights_are_recognised_by_their_content(folder, monkeypatch):
    pooling, reason = pooling_of(folder)
    assert pooling == "cls" and str(folder) in reason and "--pooling mean" in reason
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for expected in ("mean", "cls"):
        monkeypatch.setitem(weights.KNOWN_POOLING, digest, ("the small model", expected))
        pooling, reason = pooling_of(folder)
        assert pooling == expected and "the small model" in reason and "--pooling" not in reason
    # the file of the folder has precedence
    write_pooling(folder, mean_tokens=True)
    assert pooling_of(folder)[0] == "mean"
    shutil.rmtree(folder / "1_Pooling")
    write_parts(folder, "safetensors")
    assert pooling_of(folder)[0] == "cls"


@pytest.mark.skipif(not (WEIGHTS_FOLDER / "all-MiniLM-L6-v2").is_dir(), reason="run ./setup.sh first")
def test_the_small_default_was_tuned_with_a_mean():
    assert pooling_of(find_weights("minilm"))[0] == "mean"


def test_known_hashes_are_those_that_are_downloaded():
    text = (WEIGHTS_FOLDER.parent / "download.py").read_text()
    assert all(digest in text for digest in weights.KNOWN_POOLING)
