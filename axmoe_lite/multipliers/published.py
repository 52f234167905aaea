"""EvoApproxLib v2022, 8x8 signed: thirteen circuits as three integers each, and what was printed of them.

Mrazek et al., "EvoApprox8b" (DATE 2017) and the library's later releases; power, area and delay are
its PDK45 synthesis figures. The printed error figures are kept as text, because their number of
digits says how far they can be trusted: tests reproduce each of them to that precision.

Names moved between releases (1KV8 is the exact circuit of v1.x and an approximate one of v2022), so
a bare name means v2022 and the old name must be asked for as ``v1:mul8s_...``.
"""

from dataclasses import dataclass

# name   v1.x   drops   power_mw area_um2 delay_ns  MAE   WCE  EP_%   MRE_%   MSE      in the paper's eight
_TABLE = """
1KV6   1KV8   0,0,0   0.425    729.8    1.48      0     0     0.00   0.00   0          yes
1KV8   1KVA   0,0,2   0.422    711.0    1.48      1.2   5    50.00   0.28   3.8        deduced
1KV9   1KVB   0,0,3   0.410    685.2    1.47      4.2   17   68.75   0.90   34         yes
1KVA   1KX2   0,0,4   0.391    641.1    1.51      12    49   81.25   2.53   248        yes
1KVM   1KR8   1,0,0   0.369    652.8    1.37      32    128  49.80   2.40   2731       yes
1KVP   1KR6   1,0,3   0.363    635.0    1.37      33    137  74.80   2.73   2746       deduced
1KVQ   1KRC   1,0,4   0.351    599.8    1.36      36    161  84.18   3.64   2872       no
1L2J   1L2H   1,1,0   0.301    558.9    1.36      53    255  74.61   4.41   5462       yes
1KX5   1KVL   2,0,5   0.289    543.0    1.33      101   449  91.89   8.93   19690      no
1KXF   1KTY   3,0,0   0.237    482.4    1.19      224   896  87.16   15.72  95576      no
1L2L   1L2D   2,2,0   0.200    411.6    1.14      150   759  93.16   12.26  38236      yes
1L2N   1L1G   3,3,0   0.126    284.9    0.94      340   1743 97.75   27.44  191238     no
1L12   1KR3   6,0,0   0.052    172.2    0.89      2016  8064 98.05   135.77 7282910.2  no
"""


@dataclass(frozen=True)
class Published:
    """One circuit as the library prints it.

    Attributes:
        name, v1_name: its name in v2022 and in v1.x.
        drops: (drop_a, drop_b, drop_columns) of :func:`~axmoe_lite.multipliers.families.broken_array`.
        power_mw, area_um2, delay_ns: PDK45 figures.
        printed: the error figures as printed, keyed by the field of ErrorMetrics (ep and mre in percent).
        in_paper: AxMoE evaluates eight: six are named in what we know of it; 1KV8 and 1KVP are deduced.
    """

    name: str
    v1_name: str
    drops: tuple[int, int, int]
    power_mw: float
    area_um2: float
    delay_ns: float
    printed: dict[str, str]
    in_paper: bool


def _read(line: str) -> Published:
    name, v1, drops, power, area, delay, mae, wce, ep, mre, mse, paper = line.split()
    return Published(
        name=f"mul8s_{name}",
        v1_name=f"mul8s_{v1}",
        drops=tuple(map(int, drops.split(","))),
        power_mw=float(power),
        area_um2=float(area),
        delay_ns=float(delay),
        printed={"mae": mae, "wce": wce, "ep": ep, "mre": mre, "mse": mse},
        in_paper=paper != "no",
    )


PUBLISHED: tuple[Published, ...] = tuple(map(_read, _TABLE.strip().splitlines()))
