"""Bad luck: interruptions, full disks, missing permissions. A conversion is whole or it is not there."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_convert_errors import ROOT, quiet, save_sharded, tensors

from anchor_megatron.convert import aside, importing
from anchor_megatron.convert.exporting import export_checkpoint
from anchor_megatron.convert.importing import STEP, import_checkpoint
from anchor_megatron.convert.rows import same_values
from anchor_megatron.convert.sources import open_source


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    save_sharded(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    import_checkpoint(hf, tmp_path / "megatron", say=quiet)
    return tmp_path / "megatron"


def test_nothing_is_overwritten(hf: Path, megatron: Path, tmp_path: Path) -> None:
    for convert, source in ((import_checkpoint, hf), (export_checkpoint, megatron)):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "file").write_text("precious")
        with pytest.raises(ValueError, match="mine: got something there already"):
            convert(source, tmp_path / "mine", say=quiet)
        (tmp_path / "new.partial").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="new.partial: got something no conversion left"):
            convert(source, tmp_path / "new", say=quiet)
        assert (tmp_path / "mine" / "file").read_text() == "precious"


def test_an_interrupted_conversion_leaves_nothing(hf: Path, megatron: Path, tmp_path: Path) -> None:
    def interrupt(count: int) -> None:
        if count > 0:
            raise KeyboardInterrupt

    for convert, source in ((import_checkpoint, hf), (export_checkpoint, megatron)):
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", say=quiet, progress=interrupt)
        assert not list(tmp_path.glob("out*"))


def test_a_killed_conversion_is_no_checkpoint_and_the_next_run_starts_clean(hf: Path, tmp_path: Path) -> None:
    script = "import os, sys; from pathlib import Path; from anchor_megatron.convert.importing import *\n"
    script += "die = lambda count: count > 0 and os.kill(os.getpid(), 9)\n"
    script += "import_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), progress=die)"
    words = [sys.executable, "-W", "ignore", "-c", script, str(hf), str(tmp_path / "out")]
    killed = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    with pytest.raises(ValueError, match="expected a checkpoint's folder"):
        export_checkpoint(tmp_path / "out.partial", tmp_path / "hf2", say=quiet)
    said: list[str] = []
    import_checkpoint(hf, tmp_path / "out", say=said.append)
    assert "left by a run that did not finish; starting clean" in said[0]
    assert (tmp_path / "out" / STEP / "metadata.json").is_file() and not (tmp_path / "out.partial").exists()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(
    hf: Path, megatron: Path, tmp_path: Path
) -> None:
    for convert, source in ((import_checkpoint, hf), (export_checkpoint, megatron)):
        with file_size_limit(20_000), pytest.raises(OSError, match="out.partial"):
            convert(source, tmp_path / "out", say=quiet)
        assert not list(tmp_path.glob("out*"))


def test_a_disk_without_room_is_refused_before_anything_is_written(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(aside.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"out.partial: got 0.0 MB free on its disk, expected 0.0 MB"):
        import_checkpoint(hf, tmp_path / "out", say=quiet)
    assert not list(tmp_path.glob("out*"))


def test_a_folder_without_write_permission_is_an_error(hf: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(hf, Path(name) / "hf")
        (Path(name) / "locked").mkdir(mode=0o555)
        os.chmod(name, 0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(PermissionError, match="locked"):
                import_checkpoint(Path(name) / "hf", Path(name) / "locked" / "out", say=quiet)
        finally:
            os.seteuid(user)
        assert not list((Path(name) / "locked").iterdir())


def test_pieces_smaller_than_a_tensor_give_the_same_model(
    hf: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "PIECE_BYTES", 300)  # four rows of 16 values
    import_checkpoint(hf, tmp_path / "fine", say=quiet)
    for number, checkpoint in enumerate((megatron, tmp_path / "fine")):
        export_checkpoint(checkpoint, tmp_path / f"back{number}", say=quiet)
    first, second = (open_source(tmp_path / f"back{number}").tensors for number in range(2))
    assert first.keys() == tensors().keys() and all(same_values(first[name], second[name]) for name in first)
