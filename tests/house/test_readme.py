"""The README and the pages beside it are executed: their code runs as printed, their commands, files and links exist."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation import TINY

from fl_sim import Experiment, run
from fl_sim.cli import main

ROOT = Path.cwd()
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md"))]
README = Path("README.md").read_text(encoding="utf-8")
ELSEWHERE = {
    "docs/plugging_in.md",
    "docs/adaptive_pruning.md",
    "docs/doctor.md",
    "docs/tutorial.md",
    "docs/data.md",
    "docs/models.md",
    "docs/algorithms.md",
    "docs/codecs.md",
}
"""Pages whose Python needs a folder or packages of its own: test_plugging_in.py, test_doctor_table.py, test_skipping.py,
test_tutorial.py, test_data_page.py, test_models_page.py, test_algorithms_page.py, test_codecs_page.py."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> Iterator[str]:
    """Commands of the clone's own `.venv/bin/fl-sim`, each once; test_documented_commands.py finds those that no test runs."""
    lines = [line for page in PAGES for block in blocks(page, "console") for line in block.splitlines()]
    yield from (line.removeprefix("$ .venv/bin/") for line in dict.fromkeys(lines) if line.startswith("$ .venv/bin/"))


def _asked(command: str) -> object:
    """A command as a test's parameter; one that starts Ray is slow, as test_ray.py runs Ray for all else."""
    return pytest.param(command, id=command, marks=[pytest.mark.slow] if "--engine ray" in command else [])


CLIENT = next(block for block in blocks(Path("README.md"), "python") if "def proximal_client" in block)
(PARTS, _), (CONFIG,) = (blocks(Path("docs/plugging_in.md"), language) for language in ("python", "toml"))
CODECS = [blocks(Path("docs/codecs.md"), language)[0] for language in ("python", "toml")]
SAVED = {
    "my_clients.py": CLIENT,
    "my_parts.py": PARTS,
    "my_parts.toml": CONFIG,
    **dict(zip(("my_codecs.py", "my_codecs.toml"), CODECS, strict=True)),
}
"""Files that the pages let a reader save."""
WITH_A_FAULT = {
    "fl-sim doctor my_parts.toml",
    "fl-sim doctor --aggregate my_parts:equal_mean --partition my_parts:by_label",
}
"""The doctor's page says that `equal_mean` has this one."""
PROGRAMS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    if str(page) not in ELSEWHERE
    for number, block in enumerate(blocks(page, "python"))
    if block != CLIENT
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the configs, as after cloning, and the files that the pages let a reader save."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, text in SAVED.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_client_runs_as_printed() -> None:
    assert len(CLIENT.split("def ", 1)[1].strip().splitlines()) <= 20
    (toml,) = blocks(ROOT / "README.md", "toml")
    table = tomllib.loads(toml)
    report = run(Experiment.from_tree({**TINY, **table}, ['out="out"']))
    fedavg = run(Experiment.from_tree({**TINY, **table}, ['out="out0"', "client.mu=0.0"]))
    assert report.summary["failures"]["raised"] == 0
    assert report.summary["params_sha256"] != fedavg.summary["params_sha256"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_python_runs(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(program, "the page", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out, "it prints nothing"


@pytest.mark.parametrize("command", [_asked(command) for command in commands()])
def test_the_commands_run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split()
    assert words[0] == "fl-sim"
    extra = ["rounds=1", "evaluate.every=1", "training.steps=1"] if words[1] in ("run", "sweep") else []
    monkeypatch.setattr("sys.argv", [*words, *extra])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    found = [line for line in said.out.splitlines() if line.startswith("✗")]
    assert found == (["✗ It minds what sparse updates did not send"] if command in WITH_A_FAULT else [])
    assert (ended.value.code or 0) == len(found), said.err


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {target for page in PAGES for target in re.findall(r"`make ([a-z-]+)`", (ROOT / page).read_text("utf-8"))}
    assert named >= {"demo", "test", "test-all", "lint", "comparison", "docs"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_each_table_is_a_table_of_its_own(page: Path) -> None:
    """A head of a table right below another table's last row would be drawn as one of its rows."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not re.search(r"^\|.*\n\|.*\n\|---", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Dependencies")[1].split("\n## ")[0]
    optional = itertools.chain.from_iterable(project["optional-dependencies"].values())
    needed = {re.match(r"[\w-]+", requirement)[0] for requirement in [*project["dependencies"], *optional]}
    rows = re.findall(r"^\| (?!package)([a-z][^|]*) \| [^|]+ \|$", section, re.MULTILINE)
    assert set(", ".join(rows).split(", ")) == needed - {"fl-sim"}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_the_glossary_is_short_and_sorted() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Glossary")[1].split("\n## ")[0]
    terms = re.findall(r"^\| (?!term )([^|]+) \|", section, re.MULTILINE)
    assert 20 <= len(terms) <= 25
    assert terms == sorted(terms)
