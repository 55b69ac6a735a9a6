"""Figures with what chance may have done to them."""

import numpy as np


def interval(samples: np.ndarray) -> float:
    """Half the width of the 95 % interval of a mean, by the normal approximation."""
    return float(1.96 * np.std(samples, ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else 0.0
