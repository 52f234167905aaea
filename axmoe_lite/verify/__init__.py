"""Does it still compute what it says? Arithmetic against the law, and committed rows measured again.

    law     products, layers and whole networks drawn at random, each by its fast path and by looking up and adding
    rows    committed rows measured again with the code as it is now

`axmoe verify` does both on your machine: its processor may have units that ours lack.

Chapter: 23, "How do you know?"
"""

from axmoe_lite.verify.law import WAYS, against_the_law, report_paths
from axmoe_lite.verify.rows import STUDIES, Checked, again, possible, report, verify

__all__ = ["STUDIES", "WAYS", "Checked", "again", "against_the_law", "possible", "report", "report_paths", "verify"]
