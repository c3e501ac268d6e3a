from fl_sim.core.kernels.coding_reference import count_symbols as count_symbols
from fl_sim.core.kernels.coding_reference import float_join as float_join
from fl_sim.core.kernels.coding_reference import float_split as float_split
from fl_sim.core.kernels.coding_reference import pack_bits as pack_bits
from fl_sim.core.kernels.coding_reference import rans_decode as rans_decode
from fl_sim.core.kernels.coding_reference import rans_encode as rans_encode
from fl_sim.core.kernels.coding_reference import unpack_bits as unpack_bits
