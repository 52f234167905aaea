"""Weight tuning: a circuit that gets some weights wrong is given the neighbours that it gets right.

ALWANN (Mrazek et al., ICCAD 2019) replaces each weight w by the w' whose products under the multiplier M are nearest to
what was meant: argmin over w' of the sum over a of |a w - M(a, w')|. The rule depends on the multiplier alone, so a
network with tuned weights under M is, bit for bit, the network as it was under a multiplier with other columns, and
that is how it is done here: nothing is known of a network, and no image is needed.

Chapter: 16, "How fine should a choice be?"
"""

from dataclasses import replace

import torch
from torch import Tensor

from axmoe_lite.multipliers.table import OPERANDS, Multiplier, Q


def weight_map(multiplier: Multiplier, *, a: Tensor | None = None) -> Tensor:
    """For each weight the one to store instead, so that its products come out nearest to what was meant.

    argmin over w' of sum_a p(a) |a w - M(a, w')|, as ALWANN has it (there with p uniform). Of equally good ones the
    nearest to w, then the smaller, so that a weight stays where nothing is gained. ``w'`` is in -127..127, the codes
    that quantised weights have; -128 itself, which no weight has, stays too: not from the paper.

    Args:
        multiplier: any; row a + 128 of its table is the activation, column w + 128 the weight.
        a: how often each activation -128..127 occurs, [256], not negative, in any scale (counts will do); None:
            all alike. Counts give exact sums, so that ties are ties.

    Returns:
        int8 [256]: entry w + 128 is what to store for w.

    Raises:
        ValueError: for a distribution of another shape, with a negative or no weight.

    >>> from axmoe_lite.multipliers import multiplier
    >>> tuned = weight_map(multiplier("truncation(2)"))  # both operands lose two bits: 7 is read as 4
    >>> [int(tuned[w + 128]) for w in (4, 5, 6, 7, 8, 9, 127)]
    [4, 5, 6, 8, 8, 9, 127]
    """
    shares = _shares(a)
    stored = OPERANDS[1:]  # -127..127, for w as for w'
    meant = stored[:, None].double() * OPERANDS * shares  # [w, a]
    answers = multiplier.table[:, 1:].T.double() * shares  # [w', a]
    away = torch.cdist(meant, answers, p=1)  # [w, w']: no share is negative, so sum |p m - p r| = sum p |m - r|
    distance = 2 * (stored[:, None] - stored).abs() + (stored > stored[:, None])
    nearest = distance.where(away == away.amin(1, keepdim=True), 4 * Q).argmin(1)
    return torch.cat([OPERANDS[:1], stored[nearest]]).to(torch.int8)


def tuned(multiplier: Multiplier, *, after_relu: bool = False) -> Multiplier:
    """The multiplier as a network sees it whose weights were tuned to it; named ``tuned:...``, with the same power.

    M'(a, w) = M(a, weight_map(w)). No column is further from the truth than before over the activations that were asked
    about, so the mean absolute error over them is never larger; tuning twice is tuning once. What a network stores
    changes, the circuit does not: price, area and delay are what they were.

    Args:
        after_relu: only activations of 0 and above count, all alike; named ``tuned_relu:...``. It matters: over these
            ``tuned(mul8s_1L2J)`` has a mean absolute error of 63.5 where the circuit itself has 53.0, and tuned to
            them 42.7. Not from the paper.

    >>> from axmoe_lite.multipliers import errors, multiplier
    >>> before, after = multiplier("mul8s_1L2L"), tuned(multiplier("mul8s_1L2L"))
    >>> after.name, after.power_mw == before.power_mw
    ('tuned:mul8s_1L2L', True)
    >>> round(errors(before).mae, 1), round(errors(after).mae, 1)
    (149.8, 125.9)
    """
    shares = (OPERANDS >= 0).double() if after_relu else None
    columns = weight_map(multiplier, a=shares).long() + 128
    return replace(
        multiplier,
        name=f"{'tuned_relu' if after_relu else 'tuned'}:{multiplier.name}",
        table=multiplier.table[:, columns],
        source=f"{multiplier.source}; weights tuned",
    )


def _shares(a: Tensor | None) -> Tensor:
    if a is None:
        return torch.ones(Q, dtype=torch.float64)
    shares = torch.as_tensor(a).double()
    if tuple(shares.shape) != (Q,):
        raise ValueError(f"The distribution of activations is {list(shares.shape)}; give one share a value, [256].")
    if not bool(torch.isfinite(shares).all()) or float(shares.min()) < 0 or float(shares.sum()) == 0:
        raise ValueError("The distribution of activations needs finite shares, none negative and not all zero.")
    return shares
