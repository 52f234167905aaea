"""What AxMoE (arXiv 2605.04754) says, as data: its claims and its numbers, with how sure we are that it says so.

Sources: ``"abstract"`` is firm; ``"summary"`` comes from a summary of the full paper by others; ``"deduced"`` follows
from the paper's numbers by arithmetic; ``"ours"`` is not the paper's at all.

Chapter: 11, "Does the paper hold?"
"""

from dataclasses import dataclass

CNNS = ("resnet20", "vgg11_bn", "vgg19_bn")
VIT = "vit_small"
NETWORKS = (*CNNS, VIT)
AGGRESSIVE = ("mul8s_1L2L",)
"""The one at half the power; the paper's own list is not known to us."""
UNPLACED = ("mul8s_1KVA",)
"""Aggressive or moderate? It saves 8 % of the power, and the summary's table reports one failure under it."""


@dataclass(frozen=True)
class Claim:
    """One sentence to test.

    Attributes:
        id: C for the paper's claims, M for its mechanism, O for ours.
        source: ``"abstract"``, ``"summary"``, ``"deduced"`` or ``"ours"``.
        effect: what is counted, in points of accuracy, so that more of it lies to the right on an axis.
        rule: what we take for a yes, in words; never from the paper.
    """

    id: str
    statement: str
    source: str
    effect: str
    rule: str


@dataclass(frozen=True)
class Number:
    """One printed result.

    Attributes:
        id: N and the number of its row in the table; a row about two topologies has two entries.
        regimes: the one it belongs to; two where the summary does not say which.
        top1: percent as printed; None where no number is printed.
        below: whether ``top1`` is only an upper bound.
        base: percent of another cell, where it is known; then the distances from it are compared.
        base_of: its topology, multiplier and regime; None: the topology itself, exact, not retrained.
        p_norm: as printed, with its digits; ``"2 to 3"`` is a range, ``""`` none.
        what: what is compared, a word that tells entries of one row apart.
        note, cost_note: what a reader should know before comparing the accuracies, or the costs.
    """

    id: str
    network: str
    topology: str
    multiplier: str
    regimes: tuple[str, ...]
    top1: float | None
    base: float | None = None
    base_of: tuple[str, str, str] | None = None
    p_norm: str = ""
    below: bool = False
    what: str = "accuracy"
    source: str = "summary"
    note: str = ""
    cost_note: str = ""

    @property
    def statement(self) -> str:
        """The entry as a sentence.

        >>> NUMBERS[0].statement
        'resnet20 dense under mul8s_1KV6, not retrained: top-1 68.58 %, P_norm 1.00.'
        """
        says = [] if self.top1 is None else [f"top-1 {'below ' if self.below else ''}{self.top1:g} %"]
        says += [f"P_norm {self.p_norm}"] if self.p_norm else []
        regime = self.regimes[0] if len(self.regimes) == 1 else "retrained or not is not said"
        return f"{self.network} {self.topology} under {self.multiplier}, {regime}: {', '.join(says)}."


CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for claim in (
        Claim(
            "C1",
            "Without retraining, Dense is the most resilient topology on every CNN.",
            "abstract",
            "lost more than by Dense",
            "Every other topology loses more than Dense does, on the mean of the approximate multipliers that leave"
            " each of them at least twice chance.",
        ),
        Claim(
            "C2",
            "Without retraining, all topologies of ViT-Small degrade at comparable rates.",
            "abstract",
            "lost more than by Dense",
            "The mean loss of every other topology lies within 2 points of Dense's.",
        ),
        Claim(
            "C3",
            "After retraining, ResNet-20 recovers fully over the whole multiplier range.",
            "abstract",
            "above itself under the exact multiplier",
            "Retrained under any multiplier it is less than 1 point below itself retrained under the exact one, each"
            " topology for itself and all on the mean.",
        ),
        Claim(
            "C4",
            "After retraining, the VGGs recover at moderate multipliers and fail irreversibly at aggressive ones, for"
            " all topologies except Cluster on VGG11.",
            "abstract",
            "above itself under the exact multiplier (Cluster: beside the others)",
            "Against the same network retrained under the exact multiplier: less than 2 points below at moderate ones,"
            " more than 10 below at L2L; there Cluster on VGG11 loses less than the other three topologies. KVA is left"
            " out.",
        ),
        Claim(
            "C5",
            "On ViT-Small, Hard beats Dense under aggressive approximation at equal normalised inference cost.",
            "abstract",
            "by which Hard leads",
            "Both retrained under L2L, Hard answers more images, their P_norm agree within 1 %, and Hard leads by more"
            " than it does retrained under the exact one.",
        ),
        Claim(
            "M1",
            "KVA's collapse is a one-sided bias: with the constant part of its error taken away, accuracy returns.",
            "deduced",
            "back beyond half of what was lost",
            "Correcting each channel's bias returns more than half of the points that KVA costs.",
        ),
        Claim(
            "M2",
            "KVM and L2J are nearly unbiased, so what they cost is not bias, and correcting bias returns little of it.",
            "deduced",
            "back beyond half of what was lost",
            "Correcting each channel's bias returns less than half of the points that KVM or L2J cost.",
        ),
        Claim(
            "O1",
            "Refreshing BatchNorm's averages, with no weight trained, returns most of what retraining returns.",
            "ours",
            "back beyond 90 % of what retraining returns",
            "At least 90 % of it, on the mean of the approximate multipliers.",
        ),
    )
}

_NOT, _YES = ("not retrained",), ("retrained",)
_UNSAID = (*_NOT, *_YES)
_KV6, _KVA, _L2J, _L2L = "mul8s_1KV6", "mul8s_1KVA", "mul8s_1L2J", "mul8s_1L2L"
_EXACT_DENSE = ("dense", _KV6, *_NOT)
_RECOVERY = "Full recovery, says the summary, without a number: C3 judges that, this line the cost alone."
_ZOO = "The exact accuracy of Dense is that of the public checkpoint (deduced)."
_SMALL = "Ours: 20 classes at 64 pixels, patch 8, from scratch; the paper's: 200, patch 16."
_OURS = {"note": _SMALL}

NUMBERS: tuple[Number, ...] = (
    Number("N1", "resnet20", "dense", _KV6, _NOT, 68.58, p_norm="1.00"),
    Number("N1", "resnet20", "dense", _KV6, _NOT, 68.58, 68.83, ("dense", "float32", *_NOT), what="cost of eight bits",
           source="deduced", note=_ZOO),
    Number("N2", "resnet20", "dense", _L2J, _UNSAID, 68.31, 68.58, p_norm="0.71"),
    Number("N3", "resnet20", "dense", _L2L, _YES, None, p_norm="0.47", cost_note=_RECOVERY),
    Number("N3", "resnet20", "hard", _L2L, _YES, None, p_norm="0.47", cost_note=_RECOVERY),
    Number("N4", "resnet20", "soft", _KV6, _NOT, 70.78, 68.58, _EXACT_DENSE, p_norm="2 to 3",
           note="The best exact one, says the summary."),
    Number("N5", "resnet20", "hard", _L2J, _NOT, 15.0, below=True),
    Number("N5", "resnet20", "cluster", _L2J, _NOT, 15.0, below=True),
    Number("N6", "vgg11_bn", "dense", _L2J, _YES, 70.22, 70.78, p_norm="0.71", note=_ZOO),
    Number("N7", "vgg11_bn", "hard", _L2J, _UNSAID, 66.04, 70.78, _EXACT_DENSE, p_norm="0.71", note=_ZOO),
    Number("N8", "vgg11_bn", "cluster", _L2L, _YES, 42.5, 70.78, _EXACT_DENSE, note=_ZOO),
    Number("N9", "vgg19_bn", "hard", _KVA, _YES, 2.0, 73.87, _EXACT_DENSE, note=f"Printed as 'about 2'. {_ZOO}"),
    Number("N10", "vgg19_bn", "hard", _L2L, _YES, 57.66, 73.87, _EXACT_DENSE, p_norm="0.47",
           note=f"Contradicts the summary's own text. {_ZOO}"),
    Number("N11", "vit_small", "dense", _L2L, _YES, 75.0, 81.46, p_norm="0.485", **_OURS),
    Number("N12", "vit_small", "hard", _L2L, _YES, 75.97, 77.71, p_norm="0.485", **_OURS),
    Number("N12", "vit_small", "hard", _KV6, _NOT, 77.71, 81.46, _EXACT_DENSE, what="exact, behind dense",
           source="deduced", **_OURS),
    Number("N12", "vit_small", "hard", _L2L, _YES, 75.97, 75.0, ("dense", _L2L, *_YES), what="lead", **_OURS),
    Number("N13", "vit_small", "cluster", _L2L, _YES, 68.36, 81.46, _EXACT_DENSE, p_norm="1.46",
           cost_note="The paper's gateway is a ResNet-50 at 224 pixels (deduced), ours a ResNet-56 at 64.", **_OURS),
)  # fmt: skip
"""The rows of the summary's table, in its order."""
