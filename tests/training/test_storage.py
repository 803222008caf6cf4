"""Folders at fsspec URLs: what cannot be used is said at once, what is new is copied."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from piflow.training.config import TrainConfig
from piflow.training.errors import ConfigError
from piflow.training.storage import Remote, StorageError, is_url, run_folder


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/logs"


def test_a_missing_package_is_named() -> None:
    """s3fs and gcsfs are no dependencies: whoever has such a bucket installs the one it needs."""
    with pytest.raises(ConfigError, match=r"s3://bucket/run needs a package for s3://: pip install s3fs"):
        Remote("s3://bucket/run")
    with pytest.raises(ConfigError, match=r"pip install gcsfs"):
        Remote("gs://bucket/run")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere://x cannot be used: Protocol not known: nowhere"):
        Remote("nowhere://x")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file://.*/file/run cannot be used: NotADirectoryError"):
        Remote(f"file://{tmp_path}/file/run").check()


def test_check_leaves_nothing(url: str) -> None:
    remote = Remote(url)
    remote.check()
    assert remote.fs.find(remote.root) == []


def test_folders_of_a_run(tmp_path: Path, url: str) -> None:
    config = TrainConfig.model_validate({
        "output_dir": tmp_path / "run",
        "iterations": 1,
        "directories": {"logs": url, "pictures": str(tmp_path / "gallery")},
    })  # fmt: skip
    checkpoints, logs, pictures = (run_folder(config, kind, kind) for kind in ("checkpoints", "logs", "pictures"))
    assert checkpoints.local == tmp_path / "run" / "checkpoints"
    assert logs.local == tmp_path / "run" / "logs"
    assert str(logs.remote) == url
    assert pictures.local == tmp_path / "gallery"
    assert checkpoints.remote is None
    assert pictures.remote is None


def test_mirror_copies_what_is_new(tmp_path: Path, url: str) -> None:
    config = TrainConfig.model_validate({"output_dir": tmp_path, "iterations": 1, "directories": {"logs": url}})
    folder = run_folder(config, "logs", "logs")
    folder.mirror()  # nothing there yet
    (folder.local / "deep").mkdir(parents=True)
    (folder.local / "deep" / "events").write_bytes(b"one")
    (folder.local / "config.yaml").write_bytes(b"x: 1")
    folder.mirror()
    remote = Remote(url)
    assert remote.read("deep/events") == b"one"
    remote.write("config.yaml", b"changed there")
    (folder.local / "deep" / "events").write_bytes(b"one two")
    folder.mirror()
    assert remote.read("deep/events") == b"one two"
    assert remote.read("config.yaml") == b"changed there"  # it has not changed here
    assert remote.read("nothing") is None


def test_a_storage_that_fails_now_and_then_is_tried_again(tmp_path: Path, url: str, monkeypatch) -> None:
    remote, failures = Remote(url), iter([OSError("slow down"), OSError("slow down")])
    pipe_file = remote.fs.pipe_file

    def shaky(*arguments) -> None:
        for failure in failures:
            raise failure
        pipe_file(*arguments)

    monkeypatch.setattr(remote.fs, "pipe_file", shaky)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    remote.write("latest", b"step_000100")
    assert remote.read("latest") == b"step_000100"
    failures = iter([OSError("gone")] * 3)
    with pytest.raises(StorageError, match=r"memory://.* cannot be written \(latest\): OSError: gone"):
        remote.write("latest", b"step_000200")
    assert remote.read("latest") == b"step_000100"


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/run")
    assert not is_url("outputs/run")
    assert not is_url(Path("/srv/run"))
