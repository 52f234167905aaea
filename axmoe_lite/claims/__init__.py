"""A ledger of the paper's claims: what was measured, how sure it is, and whether the claim holds.

    lines = judge(rows, answers)     one a claim, and one for each comparison that it is made of
    coverage(rows)                   which part of the study has been run

    paper        what is claimed, as data
    statistics   intervals and p-values, paired over images and seeds
    cells        rows of a study, found by name
    parts        from an interval to a verdict and its reason
    numbers      printed numbers beside ours
    judge        the rule of each claim
    ledger       publish: what is recorded, judged and written down

Chapter: 11, "Does the paper hold?"
"""

from axmoe_lite.claims.cells import Cells, Contrast, chance, contrast, coverage, read_cells
from axmoe_lite.claims.judge import judge
from axmoe_lite.claims.ledger import STUDIES, WHOLE, judged, publish, recorded
from axmoe_lite.claims.paper import AGGRESSIVE, CLAIMS, CNNS, NETWORKS, NUMBERS, VIT, Claim, Number
from axmoe_lite.claims.parts import COLUMNS, VERDICTS
from axmoe_lite.claims.statistics import Interval, holm, mcnemar, paired_bootstrap, paired_t, unpaired_normal

__all__ = [
    "AGGRESSIVE",
    "CLAIMS",
    "CNNS",
    "COLUMNS",
    "NETWORKS",
    "NUMBERS",
    "STUDIES",
    "VERDICTS",
    "VIT",
    "WHOLE",
    "Cells",
    "Claim",
    "Contrast",
    "Interval",
    "Number",
    "chance",
    "contrast",
    "coverage",
    "holm",
    "judge",
    "judged",
    "mcnemar",
    "paired_bootstrap",
    "paired_t",
    "publish",
    "read_cells",
    "recorded",
    "unpaired_normal",
]
