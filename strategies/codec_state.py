"""What a codec of the user's own keeps of the server, from one message to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from fl_sim.core.types import Params, UserError
from fl_sim.runtime.client.update_validation import BadUpdate, kept


@dataclass
class CodecState:
    """Tensors by name; they are in checkpoints and never travel."""

    tensors: Params = field(default_factory=dict)

    @contextmanager
    def next(self, *, keep: bool = True) -> Iterator[dict[str, Tensor]]:
        """Context manager: the state for one `encode`, which may change it; what it leaves is kept, unless told otherwise.

        Raises:
            UserError: it leaves something that is no tensor, array or number.
        """
        state = {name: value.clone() for name, value in self.tensors.items()}
        yield state
        if keep:
            try:
                self.tensors = kept(state, "the codec's state")
            except BadUpdate as error:
                raise UserError(f"wire.codec.downlink: {error}") from error
