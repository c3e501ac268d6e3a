from fl_sim.core.kernels.change_reference import change_bins as change_bins
from fl_sim.core.kernels.change_reference import change_contexts as change_contexts
from fl_sim.core.kernels.change_reference import change_cut as change_cut
from fl_sim.core.kernels.change_reference import change_join as change_join
from fl_sim.core.kernels.change_reference import change_keys as change_keys
