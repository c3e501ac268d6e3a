import numpy as np
from numpy.typing import NDArray

def add_scaled(total: NDArray[np.float64], values: NDArray[np.float32], weight: float, /) -> None: ...
def add_sent(
    total: NDArray[np.float64],
    covered: NDArray[np.float64],
    values: NDArray[np.float32],
    sent: NDArray[np.bool_],
    weight: float,
    /,
) -> None: ...
def add_squares(
    total: NDArray[np.float64], values: NDArray[np.float32], positions: NDArray[np.int64], weight: float, /
) -> None: ...
def all_finite(values: NDArray[np.float32], /) -> bool: ...
