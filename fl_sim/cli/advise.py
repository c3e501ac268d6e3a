"""`fl-sim advise`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_sim.cli.screen import console, errors, typed
from fl_sim.core.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from fl_sim.config.experiment import Experiment
    from fl_sim.simulation.advice import Advice


def advise(
    what: Annotated[
        str, typer.Argument(metavar="MODEL_OR_CONFIG", help="experiment as TOML, or a model of `fl-sim list models`")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for instance rounds=50 data.source=cifar10")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="bytes of both directions over the whole run, for instance 50MB, 800kB or 1.5GB")
    ] = "",
    out: Annotated[Path, typer.Option(help="folder that receives the proposed configs")] = Path("advised"),
    quiet: Annotated[bool, typer.Option("--quiet", help="print the files' names only")] = False,
) -> None:
    """Propose three configs that fit a budget of bytes, each with predicted bytes and the reason.

    The first three rounds are run and recorded, and their messages are encoded again under other value types, with a part
    of the weights, and under pruning masks by distortion curves. What each proposal costs in accuracy is not predicted.

    Example: fl-sim advise configs/quickstart.toml --budget 20MB
    """
    from fl_sim.core.files import require_folder
    from fl_sim.report.progress import display
    from fl_sim.simulation.advice import RECORDED, budget_of
    from fl_sim.simulation.advice import advise as advice_for

    size = budget_of(budget) if budget else None
    if size is None:
        raise UserError("advise: --budget is missing, for instance --budget 50MB")
    require_folder(out)
    experiment = _experiment(what, overrides or [])
    short = experiment.model_copy(update={"rounds": min(RECORDED, experiment.rounds)})
    with display(short, errors, quiet=quiet or not errors.is_terminal) as observer:
        advice = advice_for(experiment, size, observer)
    files = _written(advice, out, size)
    if quiet:
        for file in files:
            console.print(str(file), highlight=False, soft_wrap=True, markup=False)
        return
    _show(experiment, advice, files, size)


def _experiment(what: str, overrides: list[str]) -> Experiment:
    from fl_sim.config.experiment import Experiment

    if what.endswith(".toml") or Path(what).is_file():
        return Experiment.load(what, overrides)
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in what)[:64]
    return Experiment.from_tree({"name": name, "model": {"name": what}}, overrides, where="advise")


def _written(advice: Advice, out: Path, budget: int) -> list[Path]:
    """The files of the proposals.

    Raises:
        UserError: a file of this name says something else, or the folder cannot be written.
    """
    import tomli_w

    made: list[Path] = []
    for number, proposal in enumerate(advice.proposals, start=1):
        tree = proposal.experiment.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        reason = " ".join(proposal.reason.split())  # a layer's name may hold a line break
        head = f"# fl-sim advise, {_mb(budget)} MB: {_mb(proposal.predicted.total)} MB are predicted.\n# {reason}.\n"
        text = head + tomli_w.dumps(tree)
        path = out / f"{proposal.experiment.name}-{number}.toml"
        try:
            out.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_text(encoding="utf-8") != text:
                raise UserError(
                    f"{path}: exists and says something else; advise never overwrites, choose another --out"
                )
            path.write_text(text, encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        made.append(path)
    return made


def _mb(size: float) -> str:
    return f"{size / 1e6:.3f}".rstrip("0").rstrip(".")


def _show(experiment: Experiment, advice: Advice, files: list[Path], budget: int) -> None:
    as_it_is = advice.as_it_is.total
    console.print(
        f"{experiment.name}: {as_it_is / 1e6:.3f} MB in {experiment.rounds} rounds as it is; the budget of {_mb(budget)} MB "
        f"{'is enough for that' if as_it_is <= budget else f'is {100 * budget / as_it_is:.1f} % of it'}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    console.print(_table(advice, budget))
    for number, (file, proposal) in enumerate(zip(files, advice.proposals, strict=True), start=1):
        console.print(f"{number}  {file}", style="bold", highlight=False, soft_wrap=True, markup=False)
        console.print(f"   {proposal.reason}", highlight=False, soft_wrap=True, markup=False)
    for reason in advice.left_out:
        console.print(f"left out: {reason}", highlight=False, soft_wrap=True, markup=False)
    for line in (
        f"Predicted from {advice.recorded} recorded rounds; 3 % of the budget is kept free. outputs: how far one",
        "round moves the model's outputs on held-out samples. No accuracy is predicted.",
        "To measure it:",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    again = shlex.join([typed(), "sweep", *map(str, files)])
    console.print(f"  {again}", highlight=False, soft_wrap=True, markup=False)


def _table(advice: Advice, budget: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title="predicted bytes of the whole run", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "proposal", "rounds", "MB up", "MB down", "MB total", "budget %", "outputs %"):
        table.add_column(name, justify="left" if name == "proposal" else "right", no_wrap=True)
    for number, each in enumerate(advice.proposals, start=1):
        sizes = each.predicted
        table.add_row(
            str(number),
            each.setting.kind,
            str(each.setting.rounds),
            f"{sizes.up / 1e6:.3f}",
            f"{sizes.down / 1e6:.3f}",
            f"{sizes.total / 1e6:.3f}",
            f"{100 * sizes.total / budget:.1f}",
            f"{100 * each.change:.2f}",
        )
    return table
