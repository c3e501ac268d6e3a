"""Worker processes start under a TMPDIR that is longer than the path of a Unix socket may be."""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Listener
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest

from fl_sim.core.types import UserError
from fl_sim.runtime.grids.socket_folder import LONGEST, NAMES, settle_socket_folder


@pytest.fixture(autouse=True)
def _not_chosen_yet(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """The folder of this process's sockets is chosen anew, and removed at the end of the test instead of the process."""
    config = mp.current_process()._config  # type: ignore[attr-defined]
    monkeypatch.setitem(config, "tempdir", None)
    monkeypatch.setattr("multiprocessing.util.Finalize", lambda *args, **options: None)
    yield
    if config["tempdir"] is not None:
        shutil.rmtree(config["tempdir"])


@pytest.fixture
def folder(length: int) -> Iterator[Path]:
    """A folder of temporary files whose path has so many bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        place = Path(short, "x" * (length - len(short) - 1))
        place.mkdir()
        yield place


@pytest.mark.parametrize(("length", "inside"), [(LONGEST - NAMES, True), (LONGEST - NAMES + 1, False), (200, False)])
def test_a_socket_can_be_made_and_other_files_stay(folder: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    settle_socket_folder()
    with Listener(family="AF_UNIX") as listener:
        assert len(os.fsencode(listener.address)) <= LONGEST
        assert Path(listener.address).is_relative_to(folder) == inside
        assert Path(listener.address).parent == Path(get_temp_dir())
    assert tempfile.gettempdir() == str(folder)


@pytest.mark.parametrize("length", [120])
def test_where_tmp_cannot_be_written_either_it_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object, **options: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(tempfile, "mkdtemp", refuses)
    with pytest.raises(UserError, match=rf"^TMPDIR = '{folder}': .*at most {LONGEST - NAMES} bytes.*/tmp: Permission"):
        settle_socket_folder()
