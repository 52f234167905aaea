"""The ledger on disk: the rows that this project has recorded, judged, as ``data/results/claims.csv``.

Chapter: 11, "Does the paper hold?"
"""

import time
from pathlib import Path

from axmoe_lite import paths, runs
from axmoe_lite.claims.judge import judge
from axmoe_lite.claims.paper import NETWORKS
from axmoe_lite.study import AT_HAND

STUDIES = {
    "resnet20": "axmoe_resnet20_cifar100",
    "vgg11_bn": "axmoe_vgg11_bn_cifar100",
    "vgg19_bn": "axmoe_vgg19_bn_cifar100",
    "vit_small": "axmoe_vit_small_tiny_imagenet_20of200",
}
EXPERTS = 4
ABOUT = "each claim of AxMoE: what was measured, with an interval, a verdict and a reason"
WHOLE = "the claim"
"""What the column ``part`` says on the line of a claim itself; the others are the comparisons that it is made of."""
MADE_BY = "python -c 'from axmoe_lite import claims; claims.publish()'"


def recorded(*, experts: int = EXPERTS) -> tuple[list[dict], list[dict]]:
    """The committed rows of the study and their answers, of all networks, each retrained as ``study.AT_HAND`` says.

    Rows of another retraining, such as on all images, are in the same files; they are not to be mixed with these.

    Args:
        experts: of the mixtures. With 1 there is nothing to choose: a mixture of one is the dense network, trained on
            for as long as a mixture is, which is a control for what training does.

    >>> rows, answers = recorded()
    >>> {row["scale"] for row in rows + answers} <= {"paper"}
    True
    """
    found = ([], [])
    for network in NETWORKS:
        for rows, name in zip(found, (STUDIES[network], f"{STUDIES[network]}_answers"), strict=True):
            rows += [row for row in runs.read(name) if _as_at_hand(row, AT_HAND[network], experts)]
    return found


def _as_at_hand(row: dict, settings: dict, experts: int) -> bool:
    wanted = (settings["retrain_epochs"], settings["retrain_images"], settings["retrain_options"]["lr"])
    has = (int(row["retrain_epochs"]), int(row["retrain_images"]), float(row["retrain_lr"]))
    as_wanted = row["regime"] != "retrained" or has == wanted
    mixed = row["topology"] == "dense" or int(row["experts"]) == experts
    return int(row["epochs"]) == settings["epochs"] and as_wanted and mixed


def judged() -> list[dict]:
    """The lines of :func:`judge` on what is recorded, each with the evidence of the rows it may rest on."""
    start = time.perf_counter()
    rows, answers = recorded()
    lines = judge(rows, answers)
    seconds = round(time.perf_counter() - start, 2)
    return [{**line, **_evidence(line, rows, seconds)} for line in lines]


def _evidence(line: dict, rows: list[dict], seconds: float) -> dict:
    """Columns as in :func:`axmoe_lite.runs.evidence`; several values with a "+" between, the most images of any."""
    mine = [row for row in rows if line["network"] in ("", None) or row["network"] in str(line["network"]).split(", ")]

    def seen(column: str) -> str:
        found = {row[column] for row in mine}
        return "+".join(sorted(found, key=lambda text: (len(text), text))) or "none"  # 9 before 10

    origin = runs.evidence(0, scale="paper", seed=0, epochs=0)
    most = {column: max((int(row[column]) for row in mine), default=0) for column in ("n_train", "n_test")}
    named = {"part": line["part"] or WHOLE}
    return {
        **named,
        **origin,
        **{column: seen(column) for column in ("dataset", "seed", "epochs")},
        **most,
        "seconds": seconds,
    }


def publish() -> Path:
    """Judge what is recorded and write ``data/results/claims.csv``, in the order of the claims."""
    lines = judged()
    (paths.results_dir() / "claims.csv").unlink(missing_ok=True)  # lines that nothing supports any more go
    return runs.record("claims", lines, key=("claim", "part"), about=ABOUT, made_by=MADE_BY)
