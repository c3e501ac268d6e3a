"""The worker actor of the Ray engine, and what a node must have in common with the program that starts actors there.

The actor's class reaches a node by value and uses only the standard library and Ray until it is told to build: a node without
fl_sim can still say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flwr.app import Context, RecordDict

from fl_sim.core.errors import UserError, in_one_line, shortened
from fl_sim.runtime.grids.folding import Fold
from fl_sim.runtime.grids.worker import Answer, Job, Workplace
from fl_sim.runtime.state.buffers import Blobs, join, split_off

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from ray import ObjectRef

Content = tuple[RecordDict, Blobs]
Answers = list[tuple[Answer, Blobs]]
PACKAGES = ("fl-sim", "torch", "torchvision", "numpy", "flwr")
"""Other versions of these may change the last bits, or fail in the middle of a run."""


@dataclass(frozen=True)
class Here:
    """The machine that an actor runs on.

    Attributes:
        node: Ray's name of the node.
        name: the machine's own name and its address.
        ip: that address.
        versions: package -> version, and of Python.
    """

    node: str
    name: str
    ip: str
    versions: Mapping[str, str]

    def differences(self) -> str:
        """List the versions that differ from those of this process; empty where none does."""
        own: Mapping[str, str] = actor_class().versions(PACKAGES)  # type: ignore[attr-defined]
        return ", ".join(
            f"{name} {self.versions.get(name, 'is missing')} (here {own[name]})"
            for name in own
            if self.versions.get(name) != own[name]
        )


class Remote(Protocol):
    """A method of an actor, as the driver calls it."""

    def remote(self, *given: object) -> object: ...


class Actor(Protocol):
    """Handle of a worker actor, as the driver sees it."""

    here: Remote
    build: Remote
    peak_bytes: Remote
    run: RunMethod
    put_aside: AsideMethod
    hand_in: SumMethod


class RunMethod(Protocol):
    """The method that runs clients."""

    def remote(
        self,
        jobs: list[Job],
        contexts: list[Context],
        contents: Mapping[int, list[ObjectRef[Content]]],
        fold: Fold | None,
    ) -> ObjectRef[Answers]: ...


class SumMethod(Protocol):
    """The method that hands in what was added up, with sums that are in Ray's store."""

    def remote(self, others: list[ObjectRef[Content]]) -> ObjectRef[Content]: ...


class AsideMethod(Protocol):
    """The method that puts a sum aside: nothing, once it is done, and the sum."""

    def options(self, *, num_returns: int) -> AsideMethod: ...

    def remote(self) -> tuple[ObjectRef[None], ObjectRef[Content]]: ...


def actor_class() -> type:
    """The class of the actor. It is made in a function, so that Ray sends its code instead of its name."""

    class Worker:
        """One process: says where it is, builds the clients' side, runs clients."""

        def here(self, packages: Sequence[str]) -> tuple[str, str, str, Mapping[str, str]]:
            import socket

            import ray

            ip = ray.util.get_node_ip_address()
            return (
                ray.get_runtime_context().get_node_id(),
                f"{socket.gethostname()} ({ip})",
                ip,
                self.versions(packages),
            )

        @staticmethod
        def versions(packages: Sequence[str]) -> Mapping[str, str]:
            import platform
            from importlib.metadata import PackageNotFoundError, version

            found = {"Python": platform.python_version()}
            for package in packages:
                try:
                    found[package] = version(package)
                except PackageNotFoundError:
                    continue
            return found

        def build(self, factory: list[object], path: list[str]) -> None:
            import sys

            shipped = [folder for folder in sys.path if "runtime_resources" in folder]  # by Ray's runtime environment
            sys.path[:] = [*shipped, *path, *(p for p in sys.path if p not in path and p not in shipped)]
            from fl_sim.runtime.grids.ray_worker import ResidentApp

            self.resident = ResidentApp(factory, list(sys.path))

        def peak_bytes(self) -> int:
            # Not getrusage, whose peak is at least that of the process that started this one.
            with open("/proc/self/status") as status:
                return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

        def run(
            self, jobs: list[object], contexts: list[object], contents: Mapping[int, list[object]], fold: object
        ) -> object:
            return self.resident.run(jobs, contexts, contents, fold)  # type: ignore[arg-type]

        def hand_in(self, others: Sequence[object]) -> object:
            return self.resident.hand_in(others)  # type: ignore[arg-type]

        def put_aside(self) -> tuple[None, object]:
            return None, self.resident.hand_in(())

    return Worker


class ResidentApp:
    """Inside of the actor: the clients' side, and the round's broadcasts, of which each is fetched once."""

    def __init__(self, factory: list[object], path: list[str]) -> None:
        import ray

        # Boxed in a list: Ray would take it out of the store before the actor has the driver's `sys.path`.
        made: Callable[[], ClientApp] = ray.get(factory[0])  # type: ignore[call-overload]
        self._workplace = Workplace(made, path)
        self._contents: dict[int, RecordDict] = {}

    def run(
        self,
        jobs: list[Job],
        contexts: list[Context],
        contents: Mapping[int, list[ObjectRef[Content]]],
        fold: Fold | None,
    ) -> Answers:
        import ray

        for key, (ref,) in contents.items():
            if key not in self._contents:
                self._contents = {k: v for k, v in self._contents.items() if k in contents}
                self._contents[key] = whole(*ray.get(ref))
        return [_bare(answer) for answer in self._workplace.task(jobs, self._contents, contexts, fold)]

    def hand_in(self, others: Sequence[ObjectRef[Content]]) -> Content:
        """What was added up here, together with sums in the store."""
        import ray

        return split_off(self._workplace.hand_in([whole(*ray.get(ref)) for ref in others]))


def _bare(answer: Answer) -> tuple[Answer, Blobs]:
    """An answer and its reply's array bytes, taken out of it."""
    blobs: Blobs = {}
    if answer.reply.has_content():
        answer.reply.content, blobs = split_off(answer.reply.content)
    return answer, blobs


def whole(content: RecordDict, blobs: Blobs) -> RecordDict:
    """A content with its array bytes in place again."""
    return join(content, {key: blob.data for key, blob in blobs.items()})


def why_not_built(error: BaseException, node: str) -> str:
    """One line about a node that could not build the clients' side, and its remedy."""
    cause = getattr(error, "cause", None)
    if cause is None:
        return f"node {node}: its worker ended while it started: {shortened(' '.join(str(error).split()))}"
    said = in_one_line(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {in_one_line(cause)}"
    return f"node {node}: {said}; {REMEDY}"


REMEDY = "a node needs this machine's code and data at the same paths (ray.working_dir ships a folder of code)"
