"""Names that nobody has: the message says the nearest one, or all that there are."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import TINY, run_tiny

from fl_sim import Experiment, UserError
from fl_sim.core.lookup import imported, nearest


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("clients:nope", "it is a package, and its functions are in clients.attacks, clients."),
        ("strategies:fedavg", "strategies.aggregation, strategies."),
        ("xml:nope", "its functions are in xml.dom, xml.etree,"),
        ("fl_sim.cli:maim", "did you mean 'main'?"),
        ("clients.presets:fedprocks", "did you mean 'fedprox'?"),
        ("fl_sim.core:x", "its functions are in fl_sim.core."),
    ],
)
def test_a_name_that_a_module_lacks_is_refused_with_what_it_has(path: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        imported("client = ", path)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "key", ["client", "strategy", "model.name", "data.source", "data.partition", "strategy.aggregate"]
)
def test_every_key_that_takes_a_path_names_the_modules_of_a_package(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=r"'strategies:nope': .*its functions are in .*strategies\.aggregation"):
        run_tiny(tmp_path, f"{key}=strategies:nope")


def test_where_nothing_is_allowed_the_list_says_so() -> None:
    assert nearest("x", []) == "; allowed: none"
    with pytest.raises(UserError, match=r"'strategies.presets:pruned' has no option 'x'; allowed: none"):
        Experiment.from_tree(TINY, ["strategy=strategies.presets:pruned", "strategy.x=1"]).strategy.build({})
