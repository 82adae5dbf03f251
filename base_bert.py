"""The model's configuration and its weights: finding, checking, mapping, saving; read files.py before it."""

import dataclasses
import functools
import json
import math
import pickle
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from errors import InputError
from files import write_whole

WEIGHTS_FOLDER = Path(__file__).resolve().parent / "weights"
KNOWN_WEIGHTS = {
    "bert-base": "bert-base-uncased",
    "bert-base-uncased": "bert-base-uncased",
    "minilm": "all-MiniLM-L6-v2",
    "all-MiniLM-L6-v2": "all-MiniLM-L6-v2",
}
SETUP_COMMANDS = {"bert-base-uncased": "./setup.sh --bert-base", "all-MiniLM-L6-v2": "./setup.sh"}
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# what the tokenizer reads beside the weights: kept with the model, so that a saved folder is complete
TOKENIZER_FILES = ("vocab.txt", "tokenizer_config.json")

ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "gelu_new": functools.partial(nn.functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)

# ---- names: ours (the course's) -> the hub's -------------------------------------------------------------

HUB_MODULES = {
    "word_embedding": "embeddings.word_embeddings",
    "pos_embedding": "embeddings.position_embeddings",
    "tk_type_embedding": "embeddings.token_type_embeddings",
    "embed_layer_norm": "embeddings.LayerNorm",
    "pooler_dense": "pooler.dense",
}
HUB_LAYER_MODULES = {
    "self_attention.query": "attention.self.query",
    "self_attention.key": "attention.self.key",
    "self_attention.value": "attention.self.value",
    "attention_dense": "attention.output.dense",
    "attention_layer_norm": "attention.output.LayerNorm",
    "interm_dense": "intermediate.dense",
    "out_dense": "output.dense",
    "out_layer_norm": "output.LayerNorm",
}


def hub_name(name):
    """Translate one of our parameter names to the hub's.

    Raises: InputError for a parameter that a BERT on the hub does not have (an adapter's, for example).
    """
    module, _, kind = name.rpartition(".")
    if module in HUB_MODULES:
        return f"{HUB_MODULES[module]}.{kind}"
    stem, _, rest = module.partition(".")
    index, _, layer_module = rest.partition(".")
    if stem == "bert_layers" and layer_module in HUB_LAYER_MODULES:
        return f"encoder.layer.{index}.{HUB_LAYER_MODULES[layer_module]}.{kind}"
    raise InputError(f"parameter {name} has no place in a plain BERT: take the adapter off before saving")


def plain_hub_name(name):
    """Bring a tensor name of any age to the hub's present form: no `bert.` prefix, no gamma and beta."""
    name = name.removeprefix("bert.")
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def is_ignored(name):
    """Tell whether a tensor is one that a plain BERT leaves out: pre-training heads, stored position ids."""
    return name.startswith("cls.") or name.endswith("position_ids")


# ---- configuration ---------------------------------------------------------------------------------------


def is_number(value, kinds):
    """Tell whether a value read from JSON is a finite number of one of these kinds (a bool is none)."""
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass
class BertConfig:
    """The sizes and constants of a BERT, under the names of the hub's config.json.

    Raises: InputError for a value that no BERT can have.
    Differs: only absolute positions and encoders; keys of config.json that do not touch these are ignored.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    position_embedding_type: str = "absolute"

    def __post_init__(self):
        for name in SIZES:
            value = getattr(self, name)
            if not (is_number(value, int) and value > 0):
                raise InputError(f"{name} is {value!r}: give a whole number above 0")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}: correct one of them"
            )
        if not (isinstance(self.hidden_act, str) and self.hidden_act in ACTIVATIONS):
            raise InputError(f"hidden_act is {self.hidden_act!r}: give one of {', '.join(ACTIVATIONS)}")
        if self.position_embedding_type != "absolute":
            raise InputError(
                f"position_embedding_type is {self.position_embedding_type!r}: use weights with 'absolute'"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not (is_number(value, (int, float)) and 0 <= value < 1):
                raise InputError(f"{name} is {value!r}: give a number from 0 to below 1")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not (is_number(value, (int, float)) and value > 0):
                raise InputError(f"{name} is {value!r}: give a number above 0")
        if not (is_number(self.pad_token_id, int) and 0 <= self.pad_token_id < self.vocab_size):
            raise InputError(f"pad_token_id is {self.pad_token_id!r}: give a whole number from 0 to below vocab_size")

    @classmethod
    def from_json(cls, path):
        """Read and check a config.json.

        Raises: InputError naming the file, the key and the value.
        """
        values = read_json(path)
        if values.get("model_type", "bert") != "bert":
            raise InputError(f"{path}: model_type is {values['model_type']!r}: give the weights of a 'bert'")
        if values.get("is_decoder"):
            raise InputError(f"{path}: is_decoder is {values['is_decoder']!r}: give the weights of an encoder")
        for name in SIZES:
            if name not in values:
                raise InputError(f"{path}: {name} is missing: add it, or download the folder again")
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            return cls(**{name: values[name] for name in names if name in values})
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_json(self, path):
        """Write the hub's config.json; the file appears whole or not at all."""
        values = {"architectures": ["BertModel"], "model_type": "bert", **dataclasses.asdict(self)}
        write_whole(path, json.dumps(values, indent=2) + "\n")


# ---- files -----------------------------------------------------------------------------------------------


def read_json(path):
    """Read a JSON file that holds an object."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}): download it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {values!r:.40}, not an object: download it again")
    return values


def missing_file(folder):
    """Name the first thing a folder of weights lacks, or give None where it is complete."""
    for name in ("config.json", "vocab.txt"):
        if not (folder / name).is_file():
            return name
    return None if find_weight_file(folder) else "model.safetensors or pytorch_model.bin"


def find_weight_file(folder):
    """Find the file that holds a folder's weights (an index where they are in parts), or give None."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def find_weights(name):
    """Find the folder of weights for `auto`, a known name, or a path.

    Raises: InputError for a folder that is absent or incomplete, with what to run.
    """
    if name == "auto":
        complete = not missing_file(WEIGHTS_FOLDER / "bert-base-uncased")
        name = "bert-base-uncased" if complete else "all-MiniLM-L6-v2"
    known = KNOWN_WEIGHTS.get(str(name))
    folder = WEIGHTS_FOLDER / known if known else Path(name)
    if not known and not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give auto, {', '.join(KNOWN_WEIGHTS)}, or a folder")
    missing = missing_file(folder)
    if missing:
        advice = f"run {SETUP_COMMANDS[known]}" if known else "put it there, or give another folder"
        raise InputError(f"{folder}: has no {missing}: {advice}")
    return folder


# ---- reading weights -------------------------------------------------------------------------------------


def load_safetensors(path):
    """Read every tensor of a .safetensors file."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}): download it again") from None


def load_bin(path):
    """Read every tensor of a PyTorch .bin file without running any code that it may hold."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make the unpickler fail in any way
        if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
            raise InputError(
                f"{path}: holds pickled code besides tensors, which is not run: use a model.safetensors"
            ) from None
        raise InputError(f"{path}: damaged or cut short: download it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, not named tensors: save a state_dict")
    for name, value in values.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise InputError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor: save a state_dict")
    return values


def load_parts(index_path):
    """Read the tensors of weights that are stored in several files, by their index."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(part, str) for part in weight_map.values()):
        raise InputError(f"{index_path}: weight_map is not a map from tensors to files: download it again")
    tensors = {}
    for part in sorted(set(weight_map.values())):
        path = index_path.parent / part
        if Path(part).name != part or not path.is_file():
            raise InputError(f"{index_path}: names {part!r}, which is not beside it: download it again")
        read = load_safetensors(path) if path.suffix == ".safetensors" else load_bin(path)
        for name, tensor in read.items():
            if weight_map.get(name) != part:
                raise InputError(f"{path}: holds {name}, which {index_path.name} places elsewhere: download both again")
            tensors[name] = tensor
    for name, part in weight_map.items():
        if name not in tensors:
            raise InputError(f"{index_path.parent / part}: tensor {name} is missing: download it again")
    return tensors


def read_weights(path):
    """Read a weight file, in one part or several, as tensors under the hub's present names.

    Raises: InputError for a file that cannot be read, or a tensor that occurs twice or cannot be a weight.
    """
    if path.name.endswith(".index.json"):
        tensors = load_parts(path)
    else:
        tensors = load_safetensors(path) if path.suffix == ".safetensors" else load_bin(path)
    weights = {}
    for name, tensor in tensors.items():
        if is_ignored(name):
            continue
        plain_name = plain_hub_name(name)
        if plain_name in weights:
            raise InputError(f"{path}: tensor {name} is there under two names: remove one")
        if not tensor.is_floating_point():
            raise InputError(f"{path}: tensor {name} is of type {tensor.dtype}: give floating-point weights")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name} holds NaN or infinity: download it again")
        weights[plain_name] = tensor
    return weights


def check_vocabulary(folder, vocab_size):
    """Refuse a vocab.txt whose number of lines is not the number of word embeddings."""
    path = folder / "vocab.txt"
    if path.is_file():
        lines = len(path.read_bytes().splitlines())
        if lines != vocab_size:
            raise InputError(
                f"{path}: has {lines} lines but config.json says vocab_size {vocab_size}: "
                "take both files from the same model"
            )


# ---- the model's base class ------------------------------------------------------------------------------


class BertPreTrainedModel(nn.Module):
    """Initialisation, loading and saving for a model that is built from a BertConfig."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer_files = {}

    def init_weights(self, generator=None):
        """Draw all weights afresh: normal matrices, zero biases, identity LayerNorms; return the model.

        Source: Devlin et al. (2019), the released code.
        Differs: normal, not truncated normal, and the padding token's embedding is 0: as transformers does.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range, generator=generator)
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, nn.Linear | nn.LayerNorm):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
        return self

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors and, where known, the tokenizer's files, as on the hub."""
        tensors = {hub_name(name): tensor.contiguous() for name, tensor in self.state_dict().items()}
        folder = Path(folder)
        write_whole(folder / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
        for name, content in self.tokenizer_files.items():
            write_whole(folder / name, content)
        # last: without it the folder does not pass for complete
        self.config.to_json(folder / "config.json")

    @classmethod
    def from_pretrained(cls, folder, generator=None, **arguments):
        """Build the model from a folder in the hub's layout; the generator draws a pooler the file lacks.

        Raises: InputError naming the file and the tensor for anything missing, unknown or of a wrong shape.
        """
        folder = Path(folder)
        path = find_weight_file(folder)
        if path is None:
            raise InputError(f"{folder}: has no model.safetensors or pytorch_model.bin: give another folder")
        config = BertConfig.from_json(folder / "config.json")
        check_vocabulary(folder, config.vocab_size)
        weights = read_weights(path)
        # on the meta device nothing is drawn or stored before the weights of the file are copied in
        with torch.device("meta"):
            model = cls(config, **arguments)
        model.to_empty(device="cpu")
        model.tokenizer_files = {
            name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()
        }
        if not any(name.startswith("pooler.") for name in weights):
            print(f"{path}: has no pooler, a new one is drawn at random", file=sys.stderr)
            generator = generator or torch.Generator().manual_seed(0)
            weights["pooler.dense.weight"] = torch.normal(
                0.0, config.initializer_range, (config.hidden_size, config.hidden_size), generator=generator
            )
            weights["pooler.dense.bias"] = torch.zeros(config.hidden_size)
        model.copy_weights(weights, path)
        return model

    def copy_weights(self, weights, path):
        """Fill every parameter from tensors under the hub's names, each used exactly once."""
        unused = set(weights)
        for name, parameter in self.state_dict().items():
            source = hub_name(name)
            if source not in weights:
                raise InputError(f"{path}: tensor {source} is missing: take all files from the same model")
            if weights[source].shape != parameter.shape:
                raise InputError(
                    f"{path}: tensor {source} has shape {list(weights[source].shape)} where config.json asks "
                    f"for {list(parameter.shape)}: take both files from the same model"
                )
            parameter.copy_(weights[source])
            unused.remove(source)
        if unused:
            raise InputError(f"{path}: tensor {min(unused)} is none of a BERT of this config.json: remove it")
