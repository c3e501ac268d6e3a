from fl_sim.core.kernels.reference import add_scaled as add_scaled
from fl_sim.core.kernels.reference import add_sent as add_sent
from fl_sim.core.kernels.reference import add_squares as add_squares
from fl_sim.core.kernels.reference import all_finite as all_finite
from fl_sim.core.kernels.reference import moved as moved
from fl_sim.core.kernels.reference import random_bits as random_bits
from fl_sim.core.kernels.reference import seed as seed
