"""What every BERT needs around its layers: configuration, parameter names, loading and saving, and dropout.

A folder of weights follows the hub's layout: config.json (the sizes, here `BertConfig`), model.safetensors (one
tensor per parameter) and vocab.txt (the tokenizer's). The parameters have two names each, for example

    here, the course's    bert_layers.0.self_attention.query.weight
    on the hub            encoder.layer.0.attention.self.query.weight

and `hub_name` translates the first into the second. `BertPreTrainedModel` is the base class of bert.py's BertModel:
it draws random weights (init_weights), or loads a folder (from_pretrained), and saves one (save_pretrained). weights.py
reads and checks the files. Dropout on a CPU, which uses a trick for speed, stands at the end.

Source: Devlin et al. (2019), the released code and weights.
"""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from errors import InputError
from files import read_json, write_whole
from weights import check_vocabulary, find_weight_file, named_folder, read_weights

# the values of hidden_act in config.json, each with its function
ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    # GELU approximated with tanh; the hub has two names for it
    "gelu_new": functools.partial(nn.functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
}
# the values that config.json must contain, because no default fits all weights
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
# Larger sizes are refused, because a model of such a size would need more memory than there is.
LARGEST, DEEPEST = 2**24, 1000
# The tokenizer reads these files from the folder of the weights. save_pretrained writes copies of them.
TOKENIZER_FILES = ("vocab.txt", "tokenizer_config.json")


# ---- configuration ---------------------------------------------------------------------------------------


def is_number(value, kinds):
    """Return whether a value read from JSON is a finite number of one of these types."""
    # Python counts True as the integer 1
    return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < math.inf


@dataclasses.dataclass
class BertConfig:
    """The sizes and constants of a BERT, under the names of the hub's config.json.

    Raises: InputError for a value that no BERT can have.
    Differs: only encoders with absolute positions. Other keys of config.json do not change such a model and are
    ignored.
    """

    vocab_size: int = 30522
    hidden_size: int = 768  # d
    num_hidden_layers: int = 12  # L
    num_attention_heads: int = 12  # h
    intermediate_size: int = 3072  # width of the feed-forward network
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512  # the largest s
    type_vocab_size: int = 2  # segments: first and second sentence
    initializer_range: float = 0.02  # standard deviation of random weights
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    position_embedding_type: str = "absolute"

    def __post_init__(self):
        probabilities = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        for names, kinds, is_possible, wanted in (
            (SIZES, int, lambda x: 0 < x < LARGEST, f"a whole number above 0 and below {LARGEST:,}"),
            (("num_hidden_layers",), int, lambda x: x <= DEEPEST, f"at most {DEEPEST} layers"),
            (probabilities, (int, float), lambda x: 0 <= x < 1, "a number from 0 to below 1"),
            (("initializer_range", "layer_norm_eps"), (int, float), lambda x: x > 0, "a number above 0"),
            (("pad_token_id",), int, lambda x: 0 <= x < self.vocab_size, "a whole number from 0 to below vocab_size"),
        ):
            for name in names:
                value = getattr(self, name)
                if not (is_number(value, kinds) and is_possible(value)):
                    raise InputError(f"{name} is {value!r}: give {wanted}")
        # every head gets the same share of the hidden units
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
            # __post_init__ checks values from anywhere; only here is their file known
            raise InputError(f"{path}: {error}") from None

    def to_json(self, path):
        """Write the hub's config.json; an interrupted write leaves the old file."""
        values = {"architectures": ["BertModel"], "model_type": "bert", **dataclasses.asdict(self)}
        write_whole(path, json.dumps(values, indent=2) + "\n")


# ---- names: the course's (left) and the hub's (right) ----------------------------------------------------

HUB_MODULES = {
    "word_embedding": "embeddings.word_embeddings",
    "pos_embedding": "embeddings.position_embeddings",
    "tk_type_embedding": "embeddings.token_type_embeddings",
    "embed_layer_norm": "embeddings.LayerNorm",
    "pooler_dense": "pooler.dense",
}
# after bert_layers.0. and encoder.layer.0.
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
    module, _, kind = name.rpartition(".")  # kind is "weight" or "bias"
    if module in HUB_MODULES:
        return f"{HUB_MODULES[module]}.{kind}"
    # bert_layers.0.attention_dense: the stem, the layer's index, the layer's module
    stem, _, rest = module.partition(".")
    index, _, layer_module = rest.partition(".")
    if stem == "bert_layers" and layer_module in HUB_LAYER_MODULES:
        return f"encoder.layer.{index}.{HUB_LAYER_MODULES[layer_module]}.{kind}"
    raise InputError(f"parameter {name} has no place in a plain BERT: take the adapter off before saving")


# ---- the model's base class ------------------------------------------------------------------------------


class BertPreTrainedModel(nn.Module):
    """Initialisation, loading and saving for a model that is built from a BertConfig."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer_files = {}  # {name: content}, for save_pretrained

    @property
    def dtype(self):
        """The type of the parameters' numbers. Source: the course's skeleton."""
        return next(self.parameters()).dtype

    def init_weights(self, generator=None):
        """Draw all weights: normal matrices, zero biases, identity LayerNorms; return the model.

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
                # no_grad: autograd forbids in-place changes of a parameter
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
        return self

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors and, if the model was loaded with them, the tokenizer's files."""
        # safetensors stores the numbers of each tensor in one block
        tensors = {hub_name(name): tensor.contiguous() for name, tensor in self.state_dict().items()}
        folder = Path(folder)
        write_whole(folder / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
        for name, content in self.tokenizer_files.items():
            write_whole(folder / name, content)
        # last, because a folder without config.json counts as incomplete
        self.config.to_json(folder / "config.json")

    @classmethod
    def from_pretrained(cls, name, generator=None, **arguments):
        """Build the model from a folder in the hub's layout, or from a known name such as "bert-base-uncased".

        The model is in evaluation mode, as in the course's skeleton and in transformers.
        Where the file has no pooler, the generator draws one.
        Raises: InputError naming the file and the tensor for anything missing, unknown or of a wrong shape.
        """
        folder = named_folder(name)
        path = find_weight_file(folder)
        if path is None:
            raise InputError(f"{folder}: has no model.safetensors or pytorch_model.bin: give another folder")
        config = BertConfig.from_json(folder / "config.json")
        check_vocabulary(folder, config.vocab_size)
        weights = read_weights(path)
        # A tensor on the meta device has a shape but no numbers, so none are drawn in vain.
        with torch.device("meta"):
            model = cls(config, **arguments)
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
        return model.eval()  # without dropout until the training loop calls train()

    def copy_weights(self, weights, path):
        """Fill every parameter from tensors under the hub's names, each used exactly once."""
        unused, ours = set(weights), {}
        for name, parameter in self.state_dict().items():
            source = hub_name(name)
            if source not in weights:
                raise InputError(f"{path}: tensor {source} is missing: take all files from the same model")
            if weights[source].shape != parameter.shape:
                raise InputError(
                    f"{path}: tensor {source} has shape {list(weights[source].shape)}, but config.json requires "
                    f"{list(parameter.shape)}: take both files from the same model"
                )
            # a copy, which outlives the file; 16-bit weights become float32
            ours[name] = weights[source].to(parameter.dtype, copy=True)
            unused.remove(source)
        if unused:
            raise InputError(f"{path}: tensor {min(unused)} is not part of the BERT of this config.json: remove it")
        self.load_state_dict(ours, assign=True)  # the tensors themselves become the parameters


# ---- dropout ---------------------------------------------------------------------------------------------

# A CPU draws 64 random bits at a time. 16 of them decide about one number, and they have this many values.
LEVELS = 65536


class Dropout(nn.Module):
    """In training, set numbers to 0 at random and scale the others up, so that the mean stays.

    Source: Srivastava et al. (2014), section 10 (scaling in training).
    Differs: on a CPU one 64-bit draw of the global generator decides about four numbers, which is faster than
    PyTorch's own dropout; p is rounded to a multiple of 1 / LEVELS and the scale is that of the rounded p.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        """Drop numbers of x; in evaluation, or where p rounds to 0, return x itself."""
        # how many of the LEVELS equally likely values drop a number; not all, since the scale divides by the rest
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        if not self.training or dropped == 0:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)  # four numbers a draw, rounded up
        # The range starts at the lowest int64, because from 0 the sign bit would never be drawn.
        draws.random_(torch.iinfo(torch.int64).min, None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)  # the same memory, read as 16-bit integers
        kept = bits >= dropped - LEVELS // 2  # an int16 runs from -LEVELS / 2 to LEVELS / 2 - 1
        # mul_ works in place on the new mask: no second tensor as large as x
        return x * kept.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


def dropout_state(device):
    """Return two functions: they get and set the state of the generator that dropout draws from on a device."""
    if device.type == "cuda":
        return lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device=device)
    source = torch.mps if device.type == "mps" else torch
    return source.get_rng_state, source.set_rng_state
