from fl_sim.core.kernels.exact_reference import add_exactly as add_exactly
from fl_sim.core.kernels.exact_reference import add_scaled_exactly as add_scaled_exactly
from fl_sim.core.kernels.exact_reference import add_sent_exactly as add_sent_exactly
