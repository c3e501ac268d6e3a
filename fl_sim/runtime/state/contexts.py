"""The nodes of a simulation: a Flower context each, made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

from flwr.app import Context, RecordDict

from fl_sim.communication.messages import PARTITION


class Contexts(MutableMapping[int, Context]):
    """Node id -> context, in this process's memory; `nodes` are those of the partitions 0, 1, ..."""

    def __init__(self, nodes: range) -> None:
        self.nodes = nodes
        self._made: dict[int, Context] = {}

    def __getitem__(self, node: int) -> Context:
        if node not in self._made:
            self._made[node] = self.fresh(node, RecordDict())
        return self._made[node]

    def __setitem__(self, node: int, context: Context) -> None:
        self._made[node] = context

    def __delitem__(self, node: int) -> None:
        raise TypeError("nodes stay")

    def __iter__(self) -> Iterator[int]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def saved(self, node: int) -> object:
        """What a node keeps now, for `put_back`; it takes space until it is put back or given up."""
        return self[node]

    def put_back(self, node: int, saved: object) -> None:
        """Let a node keep what it kept when that was saved."""
        assert isinstance(saved, Context)
        self[node] = saved

    def give_up(self, saved: object) -> None:
        """Nobody will put it back."""

    def fresh(self, node: int, state: RecordDict) -> Context:
        """A new context of a node that holds `state`.

        Raises:
            KeyError: there is no such node.
        """
        if node not in self.nodes:
            raise KeyError(node)
        config: dict[str, bool | float | int | str] = {
            PARTITION: node - self.nodes.start,
            "num-partitions": len(self.nodes),
        }
        return Context(run_id=1, node_id=node, node_config=config, state=state, run_config={})
