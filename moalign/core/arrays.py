"""The array types that rooms hand to each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
"""Numbers in float64: scores ``[n, m]`` (one row a response, one column an objective), or points ``[k, m]``."""
