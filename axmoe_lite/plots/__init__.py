"""The book's figures: one Altair theme, and charts that draw with the network off.

    theme          colours, the renderer, the sources that chapters show
    multipliers    what a multiplier gets wrong, and what it is made of
    networks       what a network makes of it
    speed          what simulating it costs

Chapters: 01 to 06.
"""

from axmoe_lite.plots.multipliers import (
    broken_array_explorer,
    error_maps,
    kept_cells,
    number_grid,
    power_error_front,
    proxy_check,
)
from axmoe_lite.plots.networks import learning_curve, resilience
from axmoe_lite.plots.speed import speed_bars, speed_scaling
from axmoe_lite.plots.theme import javascript_bundle, source, theme

__all__ = [
    "broken_array_explorer",
    "error_maps",
    "javascript_bundle",
    "kept_cells",
    "learning_curve",
    "number_grid",
    "power_error_front",
    "proxy_check",
    "resilience",
    "source",
    "speed_bars",
    "speed_scaling",
    "theme",
]
