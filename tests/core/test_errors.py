"""An error names a line of the user's own code, and none of an installed package, wherever that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_sim.core.errors import error_line


@pytest.mark.parametrize(("folder", "named"), [("mine", True), ("env/lib/site-packages", False)])
def test_only_the_users_own_lines_are_named(tmp_path: Path, folder: str, named: bool) -> None:
    path = tmp_path / folder / "part.py"
    path.parent.mkdir(parents=True)
    path.write_text("raise SystemExit(0)\n")
    with pytest.raises(SystemExit) as caught:
        exec(compile(path.read_text(), str(path), "exec"))
    assert ("(part.py, line 1)" in error_line(caught.value)) is named
