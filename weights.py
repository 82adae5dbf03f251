"""Files of weights: which folder a name means, reading its tensors, and refusing what is damaged.

A folder contains config.json, vocab.txt and the weights, in one of four forms:

    model.safetensors               one file                          pytorch_model.bin               (older)
    model.safetensors.index.json    several files and their index     pytorch_model.bin.index.json    (older)

`find_weights` turns `auto`, a known name or a path into such a folder. `read_weights` reads the tensors and returns
them under the hub's present names. `pooling_of` determines which sentence vector the weights were trained with. Every
problem is an InputError that names the file and what to do. Pickled code in a .bin file never runs.
"""

import pickle
from pathlib import Path

import safetensors.torch
import torch

from errors import InputError
from files import opened, read_json, sha256

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
# sha256 of model.safetensors: (model, the sentence vector that it was trained with)
KNOWN_POOLING = {
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db": ("all-MiniLM-L6-v2", "mean"),
    "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3": ("bert-base-uncased", "cls"),
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# torch.save starts its older format with this number as a pickle; its newer format is a zip file
TORCH_PICKLE = b"\x80\x02\x8a\x0a"
# sentence-transformers' names of a sentence vector, in its new and its old format
POOLING_MODES = {"mean": ("mean", ["pooling_mode_mean_tokens"]), "cls": ("cls", ["pooling_mode_cls_token"])}


# ---- finding ---------------------------------------------------------------------------------------------


def find_weight_file(folder):
    """Return the file of a folder's weights (the index if they are in several files), or None."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def missing_file(folder):
    """Return the first file that a folder of weights lacks, or None if the folder is complete."""
    for name in ("config.json", "vocab.txt"):
        if not (folder / name).is_file():
            return name
    return None if find_weight_file(folder) else "model.safetensors or pytorch_model.bin"


def find_weights(name):
    """Find the folder of weights for `auto`, a known name, or a path.

    Raises: InputError for a folder that is absent or incomplete, with the command to run.
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


def named_folder(name):
    """Return the folder of `auto` or of a known name, checked by find_weights, and any other path as it is."""
    return find_weights(name) if str(name) in ("auto", *KNOWN_WEIGHTS) else Path(name)


def pooling_of(folder):
    """Determine which sentence vector a folder's weights were trained with: ("mean" or "cls", the reason).

    Source: sentence-transformers, whose folders describe the pooling in 1_Pooling/config.json.
    """
    path = folder / "1_Pooling" / "config.json"
    if path.is_file():
        values = read_json(path)
        # version 6 writes "pooling_mode": "mean"; earlier ones set one key per vector to true or false
        modes = values.get("pooling_mode", [key for key in values if key.startswith("pooling_mode_") and values[key]])
        # a folder may combine several vectors, or use one that this project does not have: neither decides here
        for pooling, names in POOLING_MODES.items():
            if modes in names:
                return pooling, f"{path} sets {pooling} pooling"
    path = folder / "model.safetensors"
    if path.is_file():
        known = KNOWN_POOLING.get(sha256(path))
        if known:
            return known[1], f"{path} is {known[0]}"
    return "cls", f"{folder} does not describe its pooling; for weights of sentence-transformers use --pooling mean"


# ---- reading ---------------------------------------------------------------------------------------------


def load_safetensors(path):
    """Read every tensor of a .safetensors file."""
    with opened(path):  # refuses what cannot be read; safetensors opens the file itself
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise InputError(f"{path}: damaged or cut short ({error}): get it again") from None


def load_torch(path):
    """Read what torch.save wrote, without running any code in it.

    Raises: InputError.
    """
    with_code = f"{path}: contains pickled code besides tensors, which is not run: use a model.safetensors"
    with opened(path) as file:
        start = file.peek()[: len(TORCH_PICKLE)]
        if start[:1] == TORCH_PICKLE[:1] and start != TORCH_PICKLE:
            raise InputError(with_code)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes can make the unpickler fail in any way
            if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
                raise InputError(with_code) from None
            raise InputError(f"{path}: damaged or cut short: get it again") from None


def load_bin(path):
    """Read every tensor of a PyTorch .bin file."""
    values = load_torch(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: contains a {type(values).__name__}, not named tensors: save a state_dict")
    for name, value in values.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise InputError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor: save a state_dict")
    return values


def load_file(path):
    """Read every tensor of one file, whose ending decides the format."""
    return load_safetensors(path) if path.suffix == ".safetensors" else load_bin(path)


def load_parts(index_path):
    """Read the tensors of weights that are stored in several files, by their index."""
    # the index maps each tensor's name to the file that contains it
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(part, str) for part in weight_map.values()):
        raise InputError(f"{index_path}: weight_map is not a map from tensors to files: get it again")
    tensors = {}
    for part in sorted(set(weight_map.values())):
        path = index_path.parent / part
        # a part is a file of the same folder: no path may lead out of it
        if Path(part).name != part or not path.is_file():
            raise InputError(f"{index_path}: names {part!r}, which is not beside it: get it again")
        for name, tensor in load_file(path).items():
            if weight_map.get(name) != part:
                raise InputError(
                    f"{path}: contains {name}, which {index_path.name} places elsewhere: download both again"
                )
            tensors[name] = tensor
    for name, part in weight_map.items():
        if name not in tensors:
            raise InputError(f"{index_path.parent / part}: tensor {name} is missing: get it again")
    return tensors


def present_name(name):
    """Turn a tensor name of any age into the hub's present form: no `bert.` prefix, no gamma and beta."""
    name = name.removeprefix("bert.")
    # TensorFlow's names, which the first PyTorch versions used
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        name = name.replace(old, new)
    return name


def read_weights(path):
    """Read a weight file, or all files of an index, as tensors under the hub's present names.

    Raises: InputError for a file that cannot be read, or a tensor that occurs twice or cannot be a weight.
    """
    weights = {}
    tensors = load_parts(path) if path.name.endswith(".index.json") else load_file(path)
    for name, tensor in tensors.items():
        # a plain BERT has no pre-training heads, and its position ids are not weights
        if name.startswith("cls.") or name.endswith("position_ids"):
            continue
        if present_name(name) in weights:
            raise InputError(f"{path}: tensor {name} is there under two names: remove one")
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta, without numbers" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
            raise InputError(f"{path}: tensor {name} is {kind}: give dense floating-point weights of 16 to 64 bits")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name} contains NaN or infinity: get it again")
        weights[present_name(name)] = tensor
    return weights


def check_vocabulary(folder, vocab_size):
    """Refuse a vocab.txt whose number of lines is not the number of word embeddings.

    Raises: InputError.
    """
    path = folder / "vocab.txt"
    if path.is_file():
        with opened(path) as file:
            lines = len(file.read().splitlines())
        if lines != vocab_size:
            raise InputError(
                f"{path}: has {lines} lines but vocab_size of config.json is {vocab_size}: "
                "take both files from the same model"
            )
