"""Finding and fetching weights: local folders, the hub's cache, a hub and a file server on loopback, and no network."""

import hashlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from shared.inference import weights
from shared.inference.errors import ModelUnavailable
from shared.inference.modes import MODES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CPU = torch.device("cpu")


class Server:
    """Answers GET and HEAD from a dictionary of path to (headers, body), and remembers what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[dict[str, str], bytes]] = {}
        self.asked: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                owner.asked.append(f"{self.command} {path}")
                headers, body = owner.answers.get(path, ({}, b""))
                self.send_response(200 if path in owner.answers else 404)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                """Keep the test's output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Server]:
    """Publish a folder as a repository of a hub on loopback."""

    def publish(repository: str, folder: Path) -> Server:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        api = f"/api/models/{repository}"
        described = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        tree = [{"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in files.items()]
        answers = {
            f"{api}/revision/main": described,
            f"{api}/revision/{COMMIT}": described,
            f"{api}/tree/{COMMIT}": tree,
        }
        server.answers = {
            path: ({"Content-Type": "application/json"}, json.dumps(answer).encode())
            for path, answer in answers.items()
        }
        for name, body in files.items():
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            server.answers[f"/{repository}/resolve/{COMMIT}/{name}"] = (headers, body)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", HUB_TEMPLATE.format(server.url))
        return server

    return publish


HUB_TEMPLATE = "{}/{{repo_id}}/resolve/{{revision}}/{{filename}}"


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")


def test_a_local_folder_is_named_by_the_digest_of_its_files(tiny_segformer: Path, tmp_path: Path) -> None:
    found = weights.find(MODES["accurate"], source=str(tiny_segformer))
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update((tiny_segformer / name).read_bytes())
    assert found == weights.Weights(tiny_segformer, f"sha256:{digest.hexdigest()[:12]}")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_segformer, copy)
    assert weights.find(MODES["accurate"], source=str(copy)).revision == found.revision


def test_other_weights_in_the_same_folder_are_another_revision(tiny_segformer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_segformer, folder)
    before = weights.find(MODES["accurate"], source=str(folder)).revision
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert weights.find(MODES["accurate"], source=str(folder)).revision != before


def test_safetensors_are_preferred_to_a_pickle_beside_them(tiny_segformer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(tiny_segformer, folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert [path.name for path in weights.weight_files(folder)] == ["model.safetensors"]


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./missing", "a/b/c", "~/nothing-here", "just-a-word", "a/..b", "a--b/c"]
)
def test_a_source_that_is_neither_a_folder_nor_a_repository_is_named(source: str) -> None:
    with pytest.raises(ModelUnavailable) as raised:
        weights.find(MODES["sota"], source=source)
    assert source in str(raised.value)
    assert "maskline models pull sota" in str(raised.value)
    assert "MASKLINE_MODELS__SOTA__SOURCE" in str(raised.value)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors"):
        weights.find(MODES["sota"], source=str(tmp_path))
    assert not weights.is_present(MODES["sota"], source=str(tmp_path))


@pytest.mark.parametrize("mode", ["fast", "accurate", "sota"])
def test_offline_and_not_cached_says_so_without_asking_anyone(mode: str, tmp_path: Path, unreachable: None) -> None:
    with pytest.raises(ModelUnavailable, match="downloads are off") as raised:
        weights.find(MODES[mode], cache_folder=tmp_path, offline=True)
    assert f"maskline models pull {mode}" in str(raised.value)
    assert not weights.is_present(MODES[mode], cache_folder=tmp_path)


def test_no_network_fails_within_seconds_and_names_host_and_repository(tmp_path: Path, unreachable: None) -> None:
    started = time.monotonic()
    with pytest.raises(ModelUnavailable) as raised:
        weights.find(MODES["sota"], cache_folder=tmp_path)
    assert time.monotonic() - started < 5
    assert "facebook/mask2former-swin-large-ade-semantic" in str(raised.value)
    assert huggingface_hub.constants.ENDPOINT in str(raised.value)


def test_a_hub_that_never_answers_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(weights, "CONNECT_SECONDS", 0.3)
        started = time.monotonic()
        with pytest.raises(ModelUnavailable):
            weights.find(MODES["sota"], cache_folder=tmp_path)
        assert time.monotonic() - started < 5


def test_a_model_pulled_from_the_hub_is_there_offline_under_its_commit(
    hub: Callable[[str, Path], Server], tiny_segformer: Path, tmp_path: Path
) -> None:
    mode = MODES["accurate"]
    server = hub(mode.source, tiny_segformer)
    pulled = weights.pull(mode, cache_folder=tmp_path)
    assert pulled.revision == COMMIT
    for name in ("config.json", "model.safetensors"):
        assert (pulled.path / name).read_bytes() == (tiny_segformer / name).read_bytes()
    assert weights.is_present(mode, cache_folder=tmp_path)
    asked = len(server.asked)
    assert weights.find(mode, cache_folder=tmp_path, offline=True) == pulled
    assert weights.find(mode, cache_folder=tmp_path) == pulled
    assert len(server.asked) == asked, "a model in the cache is used without asking the hub"


def test_a_repository_named_as_source_takes_the_place_of_the_modes_own(
    hub: Callable[[str, Path], Server], tiny_segformer: Path, tmp_path: Path
) -> None:
    hub("somebody/else", tiny_segformer)
    assert weights.find(MODES["accurate"], source="somebody/else", cache_folder=tmp_path).revision == COMMIT


def test_only_the_files_of_the_model_are_fetched(
    hub: Callable[[str, Path], Server], tiny_segformer: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(tiny_segformer, folder)
    for name in ("pytorch_model.bin", "tf_model.h5", "modeling_custom.py", "README.md"):
        (folder / name).write_bytes(b"not wanted")
    server = hub("somebody/else", folder)
    pulled = weights.pull(MODES["accurate"], source="somebody/else", cache_folder=tmp_path / "cache")
    assert sorted(path.name for path in pulled.path.iterdir()) == ["config.json", "model.safetensors"]
    assert not any("custom" in path or "pytorch" in path for path in server.asked)


def test_a_repository_without_weights_is_named(hub: Callable[[str, Path], Server], tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hub("somebody/else", folder)
    with pytest.raises(ModelUnavailable, match=r"somebody/else .* has no model\.safetensors"):
        weights.pull(MODES["accurate"], source="somebody/else", cache_folder=tmp_path / "cache")


def test_a_repository_that_does_not_exist_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    with pytest.raises(ModelUnavailable, match="somebody/else"):
        weights.find(MODES["accurate"], source="somebody/else", cache_folder=tmp_path)


@pytest.fixture
def torchvision_file(server: Server, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The published file of `fast`, on loopback: its name ends in the first digits of its digest."""
    body = b"some weights" * 1000
    path = f"/models/deeplab-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    server.answers[path] = ({}, body)
    monkeypatch.setattr(weights, "torchvision_url", lambda _: server.url + path)
    return body


def test_a_torchvision_file_is_fetched_once_and_checked(
    server: Server, torchvision_file: bytes, tmp_path: Path
) -> None:
    pulled = weights.pull(MODES["fast"], cache_folder=tmp_path)
    assert pulled.path.read_bytes() == torchvision_file
    assert pulled.revision == f"sha256:{hashlib.sha256(torchvision_file).hexdigest()[:12]}"
    assert weights.find(MODES["fast"], cache_folder=tmp_path, offline=True) == pulled
    assert len(server.asked) == 1


def test_a_torchvision_file_with_another_digest_is_thrown_away(
    server: Server, torchvision_file: bytes, tmp_path: Path
) -> None:
    path = next(iter(server.answers))
    server.answers[path] = ({}, torchvision_file[:-1])
    with pytest.raises(ModelUnavailable, match="SHA-256"):
        weights.pull(MODES["fast"], cache_folder=tmp_path)
    assert list((tmp_path / "torchvision").iterdir()) == []
    assert not weights.is_present(MODES["fast"], cache_folder=tmp_path)


def test_a_torchvision_download_cut_short_leaves_nothing_behind(
    server: Server, torchvision_file: bytes, tmp_path: Path
) -> None:
    path = next(iter(server.answers))
    server.answers[path] = ({"Content-Length": str(len(torchvision_file))}, torchvision_file[: 2**12])
    with pytest.raises(ModelUnavailable):
        weights.pull(MODES["fast"], cache_folder=tmp_path)
    assert list((tmp_path / "torchvision").iterdir()) == []


def test_the_addresses_of_torchvision_are_the_ones_it_publishes() -> None:
    urls = {name: weights.torchvision_url(MODES[name]) for name in ("fast", "balanced")}
    assert urls["fast"].endswith("/deeplabv3_mobilenet_v3_large-fc3c493d.pth")
    assert urls["balanced"].endswith("/deeplabv3_resnet50_coco-cd0a2569.pth")
    assert all(url.startswith("https://") for url in urls.values())


def test_the_demo_is_always_present() -> None:
    assert weights.is_present(MODES["demo"])
    assert weights.find(MODES["demo"], offline=True).revision.startswith("sha256:")
