"""How long a generation takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random


class LatencyCurve:
    """A lognormal curve: never negative, with the long tail that generation services show.

    Args:
        mean: Mean in seconds; 0 makes every task ready at once.
        spread: Coefficient of variation: standard deviation divided by the mean.
    """

    def __init__(self, mean: float, spread: float) -> None:
        variance = math.log1p(spread**2)
        self._sigma = math.sqrt(variance)
        self._mu = math.log(mean) - variance / 2 if mean else -math.inf

    def draw(self, dice: random.Random) -> float:
        """Seconds for one task, thrown with its own dice."""
        return dice.lognormvariate(self._mu, self._sigma)
