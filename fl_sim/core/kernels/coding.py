"""The codecs' loops: compiled where there was a C compiler at installation, else NumPy; both give the same bytes."""

from fl_sim.core.kernels import change_reference
from fl_sim.core.kernels import coding_reference as reference

try:
    from fl_sim.core.kernels._change import change_bins, change_contexts, change_cut, change_join, change_keys
    from fl_sim.core.kernels._coding import (
        block_sums,
        count_symbols,
        float_join,
        float_split,
        mask_decode,
        mask_encode,
        pack_bits,
        rans_decode,
        rans_encode,
        round_blocks,
        scale_blocks,
        table_make,
        table_read,
        table_write,
        unpack_bits,
    )

    FORM = "compiled"
except ImportError:
    from fl_sim.core.kernels.change_reference import change_bins, change_contexts, change_cut, change_join, change_keys
    from fl_sim.core.kernels.coding_reference import (
        count_symbols,
        float_join,
        float_split,
        pack_bits,
        rans_decode,
        rans_encode,
        unpack_bits,
    )
    from fl_sim.core.kernels.mask_reference import mask_decode, mask_encode
    from fl_sim.core.kernels.rounding_reference import block_sums, round_blocks, scale_blocks
    from fl_sim.core.kernels.table_reference import table_make, table_read, table_write

    FORM = "NumPy"

__all__ = [
    "FORM",
    "block_sums",
    "change_bins",
    "change_contexts",
    "change_cut",
    "change_join",
    "change_keys",
    "change_reference",
    "count_symbols",
    "float_join",
    "float_split",
    "mask_decode",
    "mask_encode",
    "pack_bits",
    "rans_decode",
    "rans_encode",
    "reference",
    "round_blocks",
    "scale_blocks",
    "table_make",
    "table_read",
    "table_write",
    "unpack_bits",
]
