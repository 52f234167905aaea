"""Multipliers as tables of integer products: what they get wrong, and what they cost.

    table      Multiplier (a 256 x 256 table with its price) and its error metrics
    published  the thirteen signed 8-bit circuits of EvoApproxLib v2022 and their printed figures
    price      a proxy for the power of circuits that nobody has published, from their adder cells
    families   broken arrays, truncation, DRUM, Mitchell, RoBA, PR and ROUP, skipping by the weight's value
    tuning     weights that suit a multiplier better than what they stand for, as ALWANN has it
    mosaic     several multipliers inside one layer: by filter, channel, row or column
    files      tables and circuits of yours: .npy, .csv, .bin, C headers, EvoApproxLib's C; formats, circuit_c
    catalogue  multiplier("mul8s_1L2J"), multiplier("drum(4)"): names to multipliers

Chapter: 01, "What does a cheap multiplier get wrong?"
"""

from axmoe_lite.multipliers.catalogue import EVOAPPROX, EXACT, FAMILIES, PAPER_EIGHT, multiplier
from axmoe_lite.multipliers.families import (
    broken_array,
    drum,
    mitchell,
    outside,
    pr,
    roba,
    roup,
    truncation,
    within,
)
from axmoe_lite.multipliers.files import pinned, read_bytes, read_table
from axmoe_lite.multipliers.mosaic import Mosaic, mosaic_name
from axmoe_lite.multipliers.price import proxy_leave_one_out, proxy_power_mw
from axmoe_lite.multipliers.table import ErrorMetrics, Multiplier, error_table, errors, exact_table
from axmoe_lite.multipliers.tuning import tuned, weight_map

__all__ = [
    "EVOAPPROX",
    "EXACT",
    "FAMILIES",
    "PAPER_EIGHT",
    "ErrorMetrics",
    "Mosaic",
    "Multiplier",
    "broken_array",
    "drum",
    "error_table",
    "errors",
    "exact_table",
    "mitchell",
    "mosaic_name",
    "multiplier",
    "outside",
    "pinned",
    "pr",
    "proxy_leave_one_out",
    "proxy_power_mw",
    "read_bytes",
    "read_table",
    "roba",
    "roup",
    "truncation",
    "tuned",
    "weight_map",
    "within",
]
