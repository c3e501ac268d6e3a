"""Commands without a federation: `fl-sim prune`, `doctor`, `init` and `list`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from fl_sim.cli.screen import console, errors, show, typed
from fl_sim.core.errors import UserError

if TYPE_CHECKING:
    from fl_sim.config.codecs import CodecTarget
    from fl_sim.config.experiment import Experiment
    from fl_sim.runtime.client.doctor import Finding
    from fl_sim.training.client import Client


def prune(
    checkpoint: Annotated[Path, typer.Argument(help="safetensors state dict, or folder of a finished run")],
    method: Annotated[
        str, typer.Option(help="global, rd, lamp, erk, uniform, random, batchnorm, or module:function")
    ] = "global",
    density: Annotated[
        float | None, typer.Option(help="share of the prunable weights that stays; default: 0.1; not for batchnorm")
    ] = None,
    min_keep: Annotated[
        int | None, typer.Option(help="weights that every layer keeps at least; default: 0; not for batchnorm")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="|gamma| of a disabled channel, for batchnorm; default: 0.01")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="data source for rd and for accuracies; without one, rd draws Gaussian images, and no tokens"
        ),
    ] = None,
    images: Annotated[int | None, typer.Option(help="calibration images or texts, for rd; default: 128")] = None,
    levels: Annotated[int | None, typer.Option(help="points of a distortion curve, for rd; default: 21")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="architecture: a name of `fl-sim list`, or module:function; default: as the file says"),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="pixels a side; default: as the file says, or 32")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; default: beside the checkpoint")] = None,
) -> None:
    """Prune one model, without a federation: a table per layer, and the pruned state dict.

    Example: fl-sim prune runs/quickstart-1a2b3c4d --method rd --density 0.1 --calibration digits
    """
    from fl_sim.core.lookup import find
    from fl_sim.models import prunable_names
    from fl_sim.models.left_out import left_out, share_left_out
    from fl_sim.models.parameters import entries
    from fl_sim.report import effect, pruned_table
    from fl_sim.report.progress import counting
    from fl_sim.sparsity.curves import MeasureCurves, calibration_images
    from fl_sim.sparsity.one_model import METHODS, Request, layer_rows, require_used
    from fl_sim.training.model_file import data_for, open_saved

    chosen = find("method", method, METHODS)
    options: dict[str, float | None] = {
        "density": density,
        "min-keep": min_keep,
        "threshold": threshold,
        "images": images,
        "levels": levels,
    }
    require_used(method, [name for name, value in options.items() if value is not None])
    saved = open_saved(checkpoint, name=model, image_size=image_size)
    if method == "batchnorm" and saved.described.get("gating") is not None:
        raise UserError(
            "method 'batchnorm': cuts channels out of models without gates, and this one has some ([gating])"
        )
    if out is not None:
        saved.require_target(out)
    share, least = 0.1 if density is None else density, 0.01 if threshold is None else threshold
    data = None if calibration is None else data_for(saved, calibration)
    with counting(errors, "distortion curves") as progress:
        given = calibration_images(data, saved.shape, 128 if images is None else images, tokens=saved.tokens)
        curves = MeasureCurves(levels=21 if levels is None else levels)
        pruned = chosen(saved.model, Request(share, min_keep or 0, least, given, curves, progress))
    names = prunable_names(saved.model)
    if out_of_it := left_out(saved.model, entries(saved.model), names):
        size = sum(saved.model.get_parameter(name).numel() for name in names)
        console.print(share_left_out(out_of_it, size, "stay as they are"), highlight=False)
    show(pruned_table(layer_rows(saved.model, pruned, saved.shape, tokens=saved.tokens)))
    for line in effect(saved.model, pruned, data):
        console.print(line, highlight=False)
    if saved.tokens:
        console.print("MACs: of one sample of zeros; a model that skips padding has more on texts", highlight=False)
    value = least if method == "batchnorm" else share
    target = saved.path.with_name(f"{saved.path.stem}-{method}-{value:g}.safetensors".replace(":", "-"))
    console.print(saved.write(pruned, out or target), highlight=False)


def doctor(
    client: Annotated[
        str | None, typer.Argument(help="module:function, module:preset, or a config, whose own parts are all tried")
    ] = None,
    options: Annotated[list[str] | None, typer.Argument(help="key=value, as in the config's [client] table")] = None,
    model: Annotated[str, typer.Option(help="the model that a client is tried on")] = "cnn_bn",
    aggregate: Annotated[str | None, typer.Option(help="module:function, an aggregation rule")] = None,
    mask_rule: Annotated[str | None, typer.Option(help="module:function, a mask rule")] = None,
    allocate: Annotated[str | None, typer.Option(help="module:function, an allocation")] = None,
    partition: Annotated[str | None, typer.Option(help="module:function, a partition")] = None,
    source: Annotated[
        str | None,
        typer.Option("--data", help="module:function, a file, folder or name: a data source, with data.key=value"),
    ] = None,
    codec: Annotated[str | None, typer.Option(help="module:Class, a codec, or a name of `fl-sim list codecs`")] = None,
) -> None:
    """Try a client, or another part of your own, on a few digits and say in plain words what is wrong with it.

    Example: fl-sim doctor my_clients:proximal_client mu=0.01

    Example: fl-sim doctor --aggregate my_parts:equal_mean --partition my_parts:by_label

    Example: fl-sim doctor --codec eden bits=2

    Example: fl-sim doctor --data patients.csv data.target=outcome
    """
    from fl_sim.config.experiment import Experiment
    from fl_sim.data.own import is_own
    from fl_sim.simulation.part_doctor import examine_part
    from fl_sim.simulation.start_doctor import examine_start

    asked = {
        "aggregate": aggregate,
        "mask_rule": mask_rule,
        "allocate": allocate,
        "partition": partition,
        "data": source,
        "codec": codec,
    }
    parts = {key: path for key, path in asked.items() if path is not None}
    coded: list[CodecTarget] = []
    if client is None and not parts:
        raise UserError(
            "doctor: name a client, a config, or a part: --aggregate, --mask-rule, --allocate, --partition, --data, --codec"
        )
    if codec is not None and client is not None and "=" in client:
        coded, client = [_with_options(parts.pop("codec"), [client, *(options or [])])], None
    findings: list[Finding] = []
    if source is not None and client is not None and "=" in client:
        parts.pop("data")
        findings += _examined_data(source, [client, *(options or [])])
        client = None
    if client is not None and "=" in client:
        raise UserError(f"doctor: {client} is an option; name the client, config, --codec or --data that it is for")
    if client is not None and client.endswith(".toml"):
        there = []
        if source is not None and not is_own(source):
            there = [f"data.source={json.dumps(parts.pop('data'))}"]
        experiment = Experiment.load(client, [*there, *(options or [])])
        findings += _shown(f"config {client}", [examine_start(experiment)]) + _examined_client(experiment, model)
        parts = _own_parts(experiment) | parts
        chosen = experiment.wire.codec
        coded = [] if chosen is None else [each for each in (chosen.uplink, chosen.downlink) if each is not None]
    elif client is not None:
        experiment = Experiment.from_tree({"client": client}, [f"client.{option}" for option in options or []])
        findings += _examined_client(experiment, model)
    for key, path in parts.items():
        findings += _shown(f"{key} {path}", examine_part(key, path))
    for each in coded:
        findings += _shown(f"codec {each.target}", examine_part("codec", each.target, each.options))
    if any(finding.problem for finding in findings):
        raise typer.Exit(1)


def _examined_client(experiment: Experiment, model: str) -> list[Finding]:
    """Findings on the client that a config names, tried on a model of this name; says how its options arrive."""
    from fl_sim.runtime.client.doctor import examine

    given = {"training": experiment.local_training, "gating": experiment.gating}
    built = cast("Client", experiment.client.build(given, "client"))
    config = {k: v for k, v in experiment.client.options.items() if isinstance(v, (bool, int, float, str))}
    for key, way in experiment.client.routes().items():
        console.print(f"option {key} arrives as {way}", highlight=False, soft_wrap=True, markup=False)
    return _shown(f"client {experiment.client.target}", examine(built, model=model, config=config))


def _examined_data(source: str, overrides: list[str]) -> list[Finding]:
    """Findings on a data source under keys of a config, which say what of a table is read."""
    from fl_sim.config.experiment import Experiment
    from fl_sim.data.table import Columns
    from fl_sim.simulation.part_doctor import examine_part

    allowed = ["task", *(f"data.{name}" for name in inspect.signature(Columns).parameters)]
    if wrong := [text for text in overrides if text.partition("=")[0].strip() not in allowed]:
        raise UserError(f"doctor --data: {wrong[0]}: is not read here; allowed: {', '.join(allowed)}")
    experiment = Experiment.from_tree({"data": {"source": source}}, overrides, where="doctor --data")
    columns, targets = experiment.data.columns, experiment.learning.targets
    return _shown(f"data {source}", examine_part("data", source, columns=columns, targets=targets))


def _with_options(codec: str, options: list[str]) -> CodecTarget:
    """A codec with `key=value` options, as in its table of a config."""
    from fl_sim.config.experiment import Experiment

    table = {"wire": {"codec": {"uplink": {"target": codec}}}}
    chosen = Experiment.from_tree(table, [f"wire.codec.uplink.{option}" for option in options]).wire.codec
    assert chosen is not None
    assert chosen.uplink is not None
    return chosen.uplink


def _own_parts(experiment: Experiment) -> dict[str, str]:
    """Kind -> import path of the parts that a config names and fl-sim does not have."""
    named = {**experiment.strategy.options, "partition": experiment.data.partition, "data": experiment.data.source}
    kinds = ("aggregate", "mask_rule", "allocate", "partition", "data")
    return {key: path for key in kinds if isinstance(path := named.get(key), str) and ":" in path}


def _shown(title: str, findings: list[Finding]) -> list[Finding]:
    """The findings, which are printed."""
    console.print(title, style="bold", highlight=False, soft_wrap=True, markup=False)
    for finding in findings:
        sign, style = ("✗", "red") if finding.problem else ("✓", "green")
        console.print(f"[{style}]{sign}[/{style}] {escape(finding.check)}", highlight=False, soft_wrap=True)
        if finding.problem:
            console.print(f"    {finding.problem}", style="bold", highlight=False, soft_wrap=True, markup=False)
    return findings


def init(path: Annotated[Path, typer.Argument(help="file to write")] = Path("experiment.toml")) -> None:
    """Write a config with every key, its meaning and its default, to start from.

    Example: fl-sim init mine.toml
    """
    from fl_sim.config.reference import template

    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(template())
    except FileExistsError as error:
        raise UserError(f"{path}: exists; init never overwrites, choose another name") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    console.print(f"{path}; now: {typed()} run {path}", highlight=False, soft_wrap=True)


def list_(
    what: Annotated[str | None, typer.Argument(help="one kind only, for instance models or prune-methods")] = None,
) -> None:
    """List what a config or an option can name, one line each: clients, strategies, models, engines, trackers, and more.

    Example: fl-sim list models
    """
    from fl_sim.config.catalogue import KEYS, catalogue, first_line
    from fl_sim.core.lookup import find
    from fl_sim.report.trackers import TRACKERS

    entries = {**catalogue(), "trackers": {name: first_line(track) for name, track in TRACKERS.items()}}
    written = {**KEYS, "trackers": "fl-sim run --track"}
    for title in entries if what is None else [what]:
        lines = find("fl-sim list", title, entries)
        console.print(f"[bold]{title}[/bold] ({written[title]})", highlight=False)
        width = max(map(len, lines))
        for name, line in lines.items():
            console.print(f"  {name:<{width}}  {line}", highlight=False, soft_wrap=True, markup=False)
