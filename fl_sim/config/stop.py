"""`[stop]`: what ends a run before its last round: a metric, a budget of bytes or of virtual seconds, or patience."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import ConfigDict, Field

from fl_sim.config.sections import Section
from fl_sim.core.lookup import nearest
from fl_sim.training.tasks import LearningTask

Target = Annotated[float, Field(allow_inf_nan=False)]


class Stop(Section):
    """What ends a run before `rounds`, whichever comes first. A metric of the task is a key too: `stop = { accuracy = 0.8 }`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Target]

    mb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="most MB (10^6 bytes) of payloads of all clients, both directions; a round that would exceed it is not "
        "part of the run",
    )
    seconds: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="virtual seconds: the first round that ends then or later is the last; needs network.links",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations in a row without a new best of the task's metric, on the validation set where there is one",
    )

    @property
    def targets(self) -> Mapping[str, float]:
        """Metric -> value from which on the model is good enough."""
        return self.__pydantic_extra__ or {}

    def require_metrics(self, learning: LearningTask) -> None:
        """Complain of a key that is no metric of the task, and of a share that no model reaches.

        Raises:
            ValueError: names the key, and what is allowed.
        """
        known = [*learning.measures, *Stop.model_fields]
        for name, target in self.targets.items():
            if name not in known:
                raise ValueError(f"unknown key 'stop.{name}'{nearest(name, known)}")
            if learning.measures[name].percent and not 0 <= target <= 1:
                raise ValueError(f"stop.{name} = {target:g}: a share, not percent; allowed: 0 to 1")
