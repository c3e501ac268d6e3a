"""Payloads: parameters and masks as bytes near the entropy floor, and back.

    schema = Schema.of(params, prunable_names(model))
    data = encode(params, mask, schema=schema)
    params, mask = decode(data, schema=schema)
    describe(data, schema=schema).sections          # {"mask": ..., "values": ..., ...}, sums to len(data)

Law: `decode(encode(x)) == x` bit for bit for lossless value types, and every other input to `decode` raises
`CorruptPayload` or yields legal values of the schema's shapes. What a decoder allocates depends on the receiver's schema
alone.
"""

from fl_sim.codecs.description import Description
from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.mask_coding import mask_hash
from fl_sim.codecs.own_coding import OWN, Codec, Own
from fl_sim.codecs.payload import encode
from fl_sim.codecs.payload_reading import Opened, decode, describe, opened
from fl_sim.codecs.schema import Schema
from fl_sim.codecs.tensor_coding import finite
from fl_sim.codecs.together import Stack, alike, decode_all, encode_all
from fl_sim.codecs.value_coding import LOSSLESS, VALUES, by_itself, is_relative

__all__ = [
    "LOSSLESS",
    "OWN",
    "VALUES",
    "Codec",
    "CorruptPayload",
    "Description",
    "Opened",
    "Own",
    "Schema",
    "Stack",
    "alike",
    "by_itself",
    "decode",
    "decode_all",
    "describe",
    "encode",
    "encode_all",
    "finite",
    "is_relative",
    "mask_hash",
    "opened",
]
