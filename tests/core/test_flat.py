"""`FlatParams` and `FlatMask` are dicts to whoever uses them, whatever they remember of their buffer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fl_sim import Task, Update, codecs, load, models, snapshot
from fl_sim.core.types import FlatMask, FlatParams, Params

SHAPES = (torch.Size([2, 2]), torch.Size([]), torch.Size([0, 3]), torch.Size([2]))


def flat() -> FlatParams:
    """One whose views nobody has asked for yet."""
    return FlatParams.view(torch.arange(7.0), ("a", "b", "c", "d"), SHAPES)


def made() -> FlatParams:
    """One whose views exist."""
    params = flat()
    params["a"]
    return params


def plain() -> Params:
    """The same as a dict that the language makes."""
    return {
        "a": torch.tensor([[0.0, 1.0], [2.0, 3.0]]),
        "b": torch.tensor(4.0),
        "c": torch.zeros(0, 3),
        "d": torch.tensor([5.0, 6.0]),
    }


def saved(params: Params) -> object:
    """What `torch.load` gives of what `torch.save` wrote."""
    file = io.BytesIO()
    torch.save(params, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


NEW = {"a": torch.ones(2, 2), "e": torch.ones(1)}
READS: dict[str, Callable[[Params], object]] = {
    "copy": lambda p: p.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "or": lambda p: p | NEW,
    "or on the right": lambda p: NEW | p,
    "dict": dict,
    "two stars": lambda p: {**p},
    "keyword arguments": lambda p: dict(**p),
    "torch.save": saved,
    "length": len,
    "truth": bool,
    "iteration": list,
    "backwards": lambda p: list(reversed(p)),
    "in": lambda p: ("a" in p, "z" in p),
    "keys": lambda p: p.keys() & NEW.keys(),
    "items": lambda p: list(p.items()),
    "get": lambda p: (p.get("a"), p.get("z"), p.get("z", torch.ones(1))),
    "is equal to itself": lambda p: p == p,
    "is equal to other names": lambda p: p == {"a": 1},
    "differs from other names": lambda p: p != {"a": 1},
    "repr": repr,
}
CHANGES: dict[str, Callable[[Params], object]] = {
    "assign": lambda p: p.__setitem__("a", NEW["a"]),
    "assign another shape": lambda p: p.__setitem__("a", torch.ones(5)),
    "add": lambda p: p.__setitem__("e", NEW["e"]),
    "remove": lambda p: p.__delitem__("b"),
    "update": lambda p: p.update(NEW),
    "update by keyword": lambda p: p.update(d=torch.ones(2)),
    "or in place": lambda p: p.__ior__(NEW),
    "pop": lambda p: p.pop("d"),
    "pop another": lambda p: p.pop("z", None),
    "popitem": lambda p: p.popitem(),
    "setdefault": lambda p: (p.setdefault("a", torch.ones(1)), p.setdefault("e", torch.ones(1))),
    "clear": lambda p: p.clear(),
    "times two in place": lambda p: p.__setitem__("a", p["a"].mul_(2)),
    "another tensor behind an entry": lambda p: setattr(p["d"], "data", torch.ones(2)),
}


def alike(one: object, other: object) -> bool:
    """Equality that looks into tensors, dicts, lists and tuples."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return alike(list(one.items()), list(other.items()))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


@pytest.mark.parametrize("start", [flat, made])
@pytest.mark.parametrize("operation", READS)
def test_reading_gives_what_a_dict_gives(operation: str, start: Callable[[], FlatParams]) -> None:
    read = READS[operation]
    assert alike(read(start()), read(plain()))


@pytest.mark.parametrize("start", [flat, made])
@pytest.mark.parametrize("operation", CHANGES)
def test_changing_does_what_it_does_to_a_dict_and_the_codec_sees_it(
    operation: str, start: Callable[[], FlatParams]
) -> None:
    ours, theirs = start(), plain()
    assert alike(CHANGES[operation](ours), CHANGES[operation](theirs))
    assert alike(dict(ours), theirs)
    assert alike(ours.copy(), theirs)
    schema = codecs.Schema.of(plain(), [])
    if theirs.keys() == plain().keys() and theirs["a"].shape == plain()["a"].shape:
        assert torch.equal(schema.flat(ours), schema.flat(theirs))


def test_two_models_are_not_equal_because_nobody_looked() -> None:
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):  # what two dicts of tensors answer
        assert flat() == flat()


def test_what_one_holder_assigns_the_others_do_not_see() -> None:
    ours = flat()
    others = dict(ours)
    before = ours["a"]
    ours["a"] = ours["a"] * 2
    assert torch.equal(ours["a"] - before, plain()["a"])
    assert torch.equal(others["a"], plain()["a"])


def test_changes_in_place_reach_the_buffer() -> None:
    ours = flat()
    ours["d"] += 1
    assert isinstance(ours, FlatParams)
    assert ours.flat.tolist() == [0, 1, 2, 3, 4, 6, 7]


def test_a_mask_too() -> None:
    mask = FlatMask.pack({"a": torch.tensor([True, False]), "b": torch.tensor([[False]])})
    schema = codecs.Schema.of({"a": torch.zeros(2), "b": torch.zeros(1, 1)}, ["a", "b"])
    mask.update(a=torch.tensor([False, True]))
    assert schema.flat_mask(mask).tolist() == [False, True, False]
    assert mask.copy().keys() == {"a", "b"}


def test_a_client_that_updates_a_snapshot_sends_what_it_was_given() -> None:
    """`p = snapshot(model); p.update(task.params)` was lost where `p` had not been read before."""
    model = models.build("mlp", in_channels=1, image_size=8)
    task = Task(1, {name: value + 1 for name, value in snapshot(model).items()})
    params = snapshot(model)
    params.update(task.params)
    schema = codecs.Schema.of(task.params, models.prunable_names(model))
    sent = codecs.decode(codecs.encode(Update(params, 1).params, None, schema=schema), schema=schema)[0]
    assert alike(dict(sent), {name: task.params[name] for name in schema.names})
    assert alike(dict(snapshot(load(model, params))), task.params)
