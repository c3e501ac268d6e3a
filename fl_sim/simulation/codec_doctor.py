"""Checks of a codec of the user's own, on messages like those of a run: `fl-sim doctor --codec mine:Codec`."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import Codec, CorruptPayload, Own, Schema
from fl_sim.config.codecs import CodecTarget
from fl_sim.config.toml import Json
from fl_sim.core.errors import USERS_OWN, UserError
from fl_sim.core.types import Params
from fl_sim.runtime.client.update_validation import BadUpdate, kept
from fl_sim.simulation.own_codecs import codec_of

DRAWS = 32
"""Encodings of one message, over which the mean of what decodes is taken."""
MOST = 16
"""Memory of a decoding, in units of the tensors, above which it depends on something else; beside `FLOOR`."""
FLOOR = 1 << 26
"""Bytes that a decoding may take whatever the tensors: the first one may import."""
BYTES = 16
"""First bytes of a message that are changed one by one: where headers are."""


@dataclass(frozen=True)
class Tried:
    """A codec, and the tensors that it is tried on.

    Attributes:
        codec: the user's object.
        schema: prunable tensors of a small model.
    """

    codec: Codec
    schema: Schema

    @classmethod
    def of(cls, path: str, options: Mapping[str, Json], schema: Schema) -> Tried:
        """Build a codec. Raises UserError where it cannot be built."""
        return cls(codec_of(CodecTarget(target=path, **dict(options)), "codec"), schema.prunable_part)

    def message(self, number: int = 0) -> Params:
        """Tensors such as a client's changes: of Gaussian values; with an odd number some are a hundred times as large."""
        drawn = torch.Generator().manual_seed(number)
        flat = 0.01 * torch.randn(self.schema.size, generator=drawn)
        if number % 2:
            flat[::97] *= 100
        return self.schema.view(flat)

    def encode(self, tensors: Params, state: Params | None = None, seed: int = 0) -> bytes:
        """The codec's bytes alone."""
        own = Own(self.codec, self.schema, "codec", {} if state is None else state)
        return bytes(own.encode(self.schema.flat(tensors).numpy(), seed))

    def decode(self, data: bytes) -> Tensor:
        """Flat values; raises CorruptPayload."""
        made = Own(self.codec, self.schema, "codec").decode(memoryview(data), self.schema.size)
        values = torch.from_numpy(made)
        if not codecs.finite(values):
            raise CorruptPayload("a value is NaN or infinite")
        return values


def fits(tried: Tried) -> str:
    """It can be called, and its bytes decode to the tensors of the schema."""
    nothing = tried.schema.view(torch.zeros(tried.schema.size))
    for what, tensors in (("", tried.message()), ("", tried.message(1)), ("a message of zeros: ", nothing)):
        try:
            tried.decode(tried.encode(tensors))
        except (CorruptPayload, UserError) as error:
            return f"{what}{str(error).removeprefix('codec: ')}"
    return ""


def repeats(tried: Tried) -> str:
    """It gives the same for the same message, whatever it coded before."""
    first = tried.encode(tried.message())
    tried.encode(tried.message(1))
    if tried.encode(tried.message()) != first:
        return (
            "other bytes for the same message and state: it keeps something on itself, or draws from elsewhere than rng"
        )
    values = tried.decode(first)
    tried.decode(tried.encode(tried.message(1)))
    return "" if torch.equal(tried.decode(first), values) else "the same bytes decode to something else the second time"


def keeps_tensors(tried: Tried) -> str:
    """What it keeps are tensors of one layout."""
    state: Params = {}
    layouts = []
    for number in range(3):
        tried.encode(tried.message(number), state, number)
        try:
            state = kept(state, "state")
        except BadUpdate as error:
            return str(error)
        layouts.append({name: (tuple(value.shape), value.dtype) for name, value in state.items()})
    for before, after in itertools.pairwise(layouts):
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                return (
                    f"state[{name!r}] was {_of(before.get(name))} and is {_of(after.get(name))} after the next message"
                )
    return ""


def _of(layout: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if layout is None else f"{layout[1]} of shape {layout[0]}"


def converges(tried: Tried) -> str:
    """It is unbiased, or contractive as error feedback needs."""
    for number in range(2):
        x = tried.schema.flat(tried.message(number))
        total, lost = torch.zeros(len(x), dtype=torch.float64), 0.0
        for seed in range(DRAWS):
            left = (tried.decode(tried.encode(tried.message(number), seed=seed)) - x).double()
            total += left
            lost += float(left.square().sum()) / DRAWS
        size, bias = float(x.double().square().sum()), float((total / DRAWS).square().sum())
        if lost >= size and bias > 4 * lost / DRAWS:
            return (
                f"what it leaves out is {lost / size:.3g} times the message (squared norms), and its mean over {DRAWS} "
                f"draws is off by {bias / size:.3g}: error feedback needs less than 1, a plain mean needs no bias"
            )
    return ""


def as_claimed(tried: Tried) -> str:
    """Its messages are as long as it claims with `size(schema)`, and shorter than float32."""
    claim = getattr(tried.codec, "size", None)
    for number in range(2):
        real = len(tried.encode(tried.message(number)))
        if callable(claim) and (said := claim(tried.schema)) != real:
            return f"size(schema) says {said} bytes, and a message has {real:,}"
        if real >= tried.schema.nbytes:
            return f"a message has {real:,} bytes, and {tried.schema.nbytes:,} as float32"
    return ""


def refuses(tried: Tried) -> str:
    """It refuses messages that were cut off, or go on."""
    data = tried.encode(tried.message())
    for what, wrong in (("without bytes", b""), ("cut off by a byte", data[:-1]), ("with a byte more", data + b"\0")):
        try:
            tried.decode(wrong)
        except CorruptPayload:
            continue
        return f"a message {what} decodes to something: raise an error where the length is not what the schema says"
    return ""


@contextmanager
def _bounded(more: int) -> Iterator[None]:
    """Context manager in which this process gets only so many bytes more; on Linux alone, elsewhere nothing is bounded."""
    pages, before = Path("/proc/self/statm"), resource.getrlimit(resource.RLIMIT_AS)
    if pages.exists():
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def needs_little(tried: Tried) -> str:
    """What it allocates to decode depends on the schema alone."""
    data, most = tried.encode(tried.message()), MOST * tried.schema.nbytes + FLOOR
    for place in range(min(BYTES, len(data))):
        changed = data[:place] + bytes([data[place] ^ 0x7F]) + data[place + 1 :]
        try:
            with _bounded(most):
                tried.codec.decode(changed, tried.schema)
        except USERS_OWN as error:  # the user's own, whatever it is
            said = f"{type(error).__name__}: {error}".lower()
            if "memory" in said or "allocate" in said:
                asked = f"more than {most / 1e6:,.0f} MB for tensors of {tried.schema.nbytes / 1e6:,.1f} MB"
                return f"with byte {place} changed, decode asks for {asked}: sizes must come from the schema"
    return ""


CHECKS: tuple[Callable[[Tried], str], ...] = (
    fits,
    repeats,
    keeps_tensors,
    converges,
    as_claimed,
    refuses,
    needs_little,
)
"""The checks in order, the first of which the others need."""
