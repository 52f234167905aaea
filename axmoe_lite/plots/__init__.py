"""The book's figures: one Altair theme, and charts that draw with the network off.

    theme          colours, the renderer, the sources that chapters show
    explorer       one multiplier under sliders, all that follows from it, computed in the page
    multipliers    what a multiplier gets wrong, and what it is made of
    live           one multiplier in three pictures with fixed scales, for the explorer with a kernel
    layers         what a layer does to numbers: bytes, and sums of wrong products
    networks       what a network makes of it
    experts        who answers: mixtures, their load, and what approximation does to the choice
    learning       what training sees of a product, and what it gives back
    speed          what simulating it costs
    cost           what an answer costs in each topology, and what accuracy it buys
    runs           which run was at work when
    picker         any number of a study, by four menus
    study          a whole study: what each topology keeps under each circuit, what heals it, what it costs
    search         what each part can bear, and the fronts of assignments that were searched for
    noise          what errors were foretold, what noise layers bear, and what it buys
    points         which circuit each layer gets at each operating point, what that costs, and a run that switches
    places         who works when and where: parts on core types, images that step through stages
    dispatch       which network for which input: pools, fronts of dispatchers, films
    stages         seconds of layers foretold and measured, what a pipeline gains, who works when
    granularity    how fine a choice is, and which search finds it with how many networks
    claims         a ledger of claims: comparisons, intervals, verdicts
    trust          what the tests have tried, bugs planted, memory under load

Chapters: 00 to 22.
"""

from axmoe_lite.plots.claims import effects, verdicts
from axmoe_lite.plots.cost import accuracy_cost, cost_explorer, executed_stored, pareto
from axmoe_lite.plots.dispatch import dispatch_fronts, film_rules, pool_members
from axmoe_lite.plots.experts import changed_choices, cluster_samples, loads, who_answers
from axmoe_lite.plots.explorer import explorer
from axmoe_lite.plots.granularity import effort, effort_bars, reached, searched_fronts, shared_terms, weight_tuning
from axmoe_lite.plots.layers import (
    channel_ranges,
    channel_shifts,
    clip_errors,
    clip_explorer,
    code_counts,
    corrected,
    straight_through,
    sum_errors,
)
from axmoe_lite.plots.learning import product_slopes, recovered, recovery_curves
from axmoe_lite.plots.live import error_histogram, error_map_of, power_place
from axmoe_lite.plots.multipliers import (
    error_maps,
    kept_cells,
    number_grid,
    power_error_front,
    proxy_check,
)
from axmoe_lite.plots.networks import healing, layer_errors, leans, learning_curve, resilience
from axmoe_lite.plots.noise import noise_fronts, predictions, tolerance_bars
from axmoe_lite.plots.picker import row_picker
from axmoe_lite.plots.places import crossings, energy_fronts, gantt, places_map
from axmoe_lite.plots.points import budget_trace, instance_costs, point_accuracy, point_tiles
from axmoe_lite.plots.runs import timeline
from axmoe_lite.plots.search import mixed_fronts, sensitivities
from axmoe_lite.plots.speed import speed_bars, speed_scaling
from axmoe_lite.plots.stages import error_bars, foretold_times, gain_bars, stage_gantt, ways_bars
from axmoe_lite.plots.study import coverage_chart, fronts, heat_map, recovery, resilience_curves
from axmoe_lite.plots.theme import javascript_bundle, source, theme
from axmoe_lite.plots.trust import planted, soak, tried

__all__ = [
    "accuracy_cost",
    "budget_trace",
    "changed_choices",
    "channel_ranges",
    "channel_shifts",
    "clip_errors",
    "clip_explorer",
    "cluster_samples",
    "code_counts",
    "corrected",
    "cost_explorer",
    "coverage_chart",
    "crossings",
    "dispatch_fronts",
    "effects",
    "effort",
    "effort_bars",
    "energy_fronts",
    "error_bars",
    "error_histogram",
    "error_map_of",
    "error_maps",
    "executed_stored",
    "explorer",
    "film_rules",
    "foretold_times",
    "fronts",
    "gain_bars",
    "gantt",
    "healing",
    "heat_map",
    "instance_costs",
    "javascript_bundle",
    "kept_cells",
    "layer_errors",
    "leans",
    "learning_curve",
    "loads",
    "mixed_fronts",
    "noise_fronts",
    "number_grid",
    "pareto",
    "places_map",
    "planted",
    "point_accuracy",
    "point_tiles",
    "pool_members",
    "power_error_front",
    "power_place",
    "predictions",
    "product_slopes",
    "proxy_check",
    "reached",
    "recovered",
    "recovery",
    "recovery_curves",
    "resilience",
    "resilience_curves",
    "row_picker",
    "searched_fronts",
    "sensitivities",
    "shared_terms",
    "soak",
    "source",
    "speed_bars",
    "speed_scaling",
    "stage_gantt",
    "straight_through",
    "sum_errors",
    "theme",
    "timeline",
    "tolerance_bars",
    "tried",
    "verdicts",
    "ways_bars",
    "weight_tuning",
    "who_answers",
]
