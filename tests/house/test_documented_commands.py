"""Commands in the documents that take hours or other data: not run, but parsed as the command line and the config parse them.

`bash` executes each `bash` block with a stand-in for `fl-sim` that only records its arguments, so that loops, variables
and functions have their effect. test_readme.py runs the commands of `console` blocks for real.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from fl_sim import Experiment
from fl_sim.cli.app import parser
from fl_sim.simulation.sweep import integers, plan, sorted_out

ROOT = Path.cwd()
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"python", "toml", "console", "bash", "bibtex"}
OF_THE_READER = {"my_parts.toml", "my_codecs.toml", "advised/quickstart-rounded-1.toml"}
"""Configs that a page lets its reader save, or a command write."""
NOT_RUN = {"$ pip install ."}
"""It downloads PyTorch, Ray and Flower."""
STAND_IN = "#!{python} -S\nimport json, sys\nopen({log!r}, 'a').write(json.dumps(sys.argv{after}) + '\\n')\n"
FLOWERS = ("flwr", "flower-superlink", "flower-supernode", "ray")
"""Programs of Flower and Ray, which the slow tests start."""
STARTED = "".join(
    Path("tests", name).read_text("utf-8")
    for name in ("support/superlink.py", "support/ray_nodes.py", "runtime/test_superlink.py")
)
SHELL = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page, text in TEXTS.items()
    for number, (language, block) in enumerate(FENCED.findall(text))
    if language == "bash"
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tutorial = TEXTS[Path("docs/tutorial.md")]
    for name, text in re.findall(r"Save this as `(\w+\.py)`:\n\n```python\n(.*?)```", tutorial, re.DOTALL):
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def inline(text: str, program: str) -> Iterator[str]:
    """Commands between backticks in running text and tables."""
    yield from re.findall(rf"`((?:\.venv/bin/)?{program} [^`\n]+)`", FENCED.sub("", text))


def require_valid(arguments: list[str]) -> None:
    """Raises for an unknown command, option, config, key or preset option; names in capitals stand for the reader's own."""
    command = parser()
    with command.make_context("fl-sim", list(arguments)) as context:
        while hasattr(command, "commands"):
            name, command, arguments = command.resolve_command(context, arguments)
            assert command is not None, name
            context = command.make_context(name, list(arguments), parent=context)
            arguments = [*context._protected_args, *context.args] if hasattr(command, "commands") else arguments
    given = context.params
    if name == "run":
        configs, overrides, seeds = [given["config"]], given["overrides"] or [], "0"
    elif name == "sweep":
        (configs, overrides), seeds = sorted_out(given["words"]), given["seeds"]
    else:
        return
    for config in configs:
        if not str(config).isupper() and str(config) not in OF_THE_READER:
            for experiment in plan(config, overrides, seeds=integers("--seeds", seeds)):
                require_options(experiment)


def require_options(experiment: Experiment) -> None:
    """The options of presets are their parameters; a client function `(task, ctx)` finds any option in `task.config`."""
    for target in (experiment.client, experiment.strategy):
        parameters = inspect.signature(target.resolve()).parameters
        unknown = target.options.keys() - parameters.keys()
        assert not unknown or "ctx" in parameters, f"{target.target}: {unknown}"


def require_started(program: str, arguments: list[str]) -> None:
    """Raises for an option that no test gives to such a program, and for paths that are not there."""
    assert f'"{program}"' in STARTED
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{option}"' in STARTED, f"{program} {option}"
    if program == "flwr":
        assert (ROOT / arguments[1] / "pyproject.toml").exists(), arguments[1]
        configs = re.findall(r"config='([^']+)'", " ".join(arguments))
        assert configs
        assert all(Path(config).exists() for config in configs), configs


@pytest.mark.parametrize("block", SHELL)
def test_the_commands_of_a_shell_block_are_valid(block: str, tmp_path: Path) -> None:
    log, flowers = tmp_path / "log", tmp_path / "flowers-log"
    for name, file, after in (("fl-sim", log, "[1:]"), *((name, flowers, "") for name in FLOWERS)):
        file.touch()
        (tmp_path / name).write_text(STAND_IN.format(python=sys.executable, log=str(file), after=after))
        (tmp_path / name).chmod(0o755)
    study = tmp_path / "runs/kd-capacity-study"  # a block looks for a model there
    study.mkdir(parents=True)
    (study / "resnet20-0.safetensors").touch()
    script = f"set -u; PATH={shlex.quote(str(tmp_path))}:$PATH\n{block}\nwait"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert "unbound" not in done.stderr
    assert "command not found" not in done.stderr
    called = [json.loads(line) for line in log.read_text().splitlines()]
    of_flower = [json.loads(line) for line in flowers.read_text().splitlines()]
    assert called or of_flower
    for arguments in called:
        require_valid(arguments)
    for command in of_flower:
        require_started(Path(command[0]).name, command[1:])


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_commands_in_the_text_are_valid(page: Path) -> None:
    for command in inline(TEXTS[page], "fl-sim"):
        _, *arguments = shlex.split(command)
        if len(arguments) == 1:  # the name of a command, or an option of the program
            arguments.append("--help")
        with contextlib.suppress(click.exceptions.Exit):
            require_valid(arguments)


@cache
def _texts_of_tests() -> list[str]:
    return [test.read_text(encoding="utf-8") for test in (ROOT / "tests").glob("*/test_*.py")]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_test_runs_every_line_of_a_console_block(page: Path) -> None:
    """test_readme.py runs commands of `.venv/bin/fl-sim`; a page with others has a test of its own that reads the page."""
    of_its_own = any(f'"{page}"' in text for text in _texts_of_tests())
    for line in (
        line for language, block in FENCED.findall(TEXTS[page]) for line in block.splitlines() if language == "console"
    ):
        assert line in NOT_RUN or line.startswith("$ .venv/bin/fl-sim ") or of_its_own, line
        if line not in NOT_RUN:
            require_valid(shlex.split(line.removeprefix("$ "))[1:])


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_test_files_in_the_text_exist(page: Path) -> None:
    for command in inline(TEXTS[page], "(?:pytest|python)"):
        for word in shlex.split(command):
            if word.endswith(".py") and not re.search("[A-Z]{3}", word):
                assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_block_has_a_language_that_a_test_checks(page: Path) -> None:
    assert {language for language, _ in FENCED.findall(TEXTS[page])} <= LANGUAGES
    assert not re.search(r"\n\n    \S", FENCED.sub("", TEXTS[page])), "an indented block: fence it"


@pytest.mark.parametrize(
    "command",
    [
        "run configs/quickstart.toml rounds=many",
        "run configs/quikstart.toml",
        "sweep configs/quickstart.toml training.rate=0.1",
        "run configs/quickstart_topk.toml client.dense=0.1",
        "bench pruning --aditivity",
        "brench engine",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises(Exception, match=r".+"):
        require_valid(command.split())
