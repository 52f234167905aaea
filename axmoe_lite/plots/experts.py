"""Who answers: what goes to which expert, how even the load is, and what approximation does to the choice.

Chapter: 07, "What if only some of the network answers?"
"""

import base64
import io
from collections.abc import Mapping, Sequence

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from axmoe_lite.moe import Routing, RoutingStatistics
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY

_EXPERTS = [BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY]


def who_answers(seen: Mapping[str, Sequence[Routing]], labels: Tensor, classes: Sequence[str]) -> alt.LayerChart:
    """Which share of each class goes to which expert, one mixture at a time; a slider walks through them.

    Args:
        seen: what :func:`axmoe_lite.moe.watching` noted while the network ran on images of these labels, once each,
            in their order.
        labels: int64 [N], of those images.
        classes: their names.

    Raises:
        ValueError: if a mixture chose another number of times than there are labels (it routes tokens, or the
            network ran more often).
    """
    rows, names = [], list(seen)
    for number, name in enumerate(names):
        choice = torch.cat([routing.choice.cpu() for routing in seen[name]])
        if len(choice) != len(labels):
            raise ValueError(
                f"Mixture {name!r} chose {len(choice)} times for {len(labels)} images; run the network on them once,"
                " and let it route images."
            )
        experts = seen[name][0].probabilities.shape[1]
        counts = torch.bincount(labels.cpu() * experts + choice, minlength=len(classes) * experts)
        for c, of_class in enumerate(counts.view(len(classes), experts).tolist()):
            rows += [
                {"mixture": number, "class": classes[c], "expert": e, "images": n, "share": n / max(1, sum(of_class))}
                for e, n in enumerate(of_class)
            ]
    last = len(names) - 1
    slider = alt.param("mixture_shown", value=last, bind=alt.binding_range(min=0, max=last, step=1, name="mixture  "))
    shown = "[" + ",".join(f"'{name or 'the whole network'}'" for name in names) + "][mixture_shown]"
    base = (
        alt.Chart(pd.DataFrame(rows).round({"share": 4}))
        .transform_filter("datum.mixture==mixture_shown")
        .encode(
            x=alt.X("expert:O", title="expert", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("class:N", title="class of the image", sort=list(classes)),
            tooltip=["class", "expert", "images", alt.Tooltip("share:Q", format=".0%")],
        )
    )
    cells = base.mark_rect(stroke="white").encode(
        color=alt.Color(
            "share:Q",
            title=["share of the", "class's images"],
            scale=alt.Scale(range=["#f4f7fb", BLUE], domain=[0, 1]),
            legend=alt.Legend(format="%", gradientLength=160),
        )
    )
    numbers = (
        base.transform_filter("datum.images>0")
        .mark_text(fontSize=12)
        .encode(
            text=alt.Text("share:Q", format=".0%"),
            color=alt.condition("datum.share>0.55", alt.value("white"), alt.value("#222222")),
        )
    )
    title = alt.Title(
        alt.ExprRef(f"'Who answers what in '+{shown}+'?'"),
        subtitle="Each row adds up to 100 %. The slider walks through the mixtures.",
    )
    return (cells + numbers).add_params(slider).properties(width=260, height=alt.Step(24), title=title)


def loads(routed: Mapping[str, Mapping[str, RoutingStatistics]]) -> alt.ConcatChart:
    """How the images of each mixture are shared out among its experts, against an even load; one panel a network.

    Args:
        routed: by network's name, by mixture's name, what :func:`axmoe_lite.moe.statistics` says.
    """
    panels, most = [], max(len(s.load) for layers in routed.values() for s in layers.values())
    for number, (network, layers) in enumerate(routed.items()):
        order = [name or "the whole network" for name in layers]
        bars, texts = [], []
        for name, found in zip(order, layers.values(), strict=True):
            start = 0.0
            for e, share in enumerate(found.load):
                bars.append({"layer": name, "expert": e, "from": start, "to": start + share, "load": share})
                start += share
            texts.append({"layer": name, "balance": found.balance, "confidence": found.confidence})
        y = alt.Y("layer:N", sort=order, title=None, axis=alt.Axis(ticks=False, labels=number % 2 == 0))
        marks = (
            alt.Chart(pd.DataFrame(bars).round(4))
            .mark_bar(stroke="white", height=20)
            .encode(
                y=y,
                x=alt.X(
                    "from:Q", title="share of the images", axis=alt.Axis(format="%", grid=False, values=[0, 0.5, 1])
                ),
                x2="to:Q",
                color=alt.Color(
                    "expert:O",
                    scale=alt.Scale(domain=list(range(most)), range=_EXPERTS[:most]),
                    legend=alt.Legend(orient="bottom", symbolType="square"),
                ),
                tooltip=["layer", "expert", alt.Tooltip("load:Q", format=".1%")],
            )
        )
        even = pd.DataFrame({"even": [e / most for e in range(1, most)]})
        rules = alt.Chart(even).mark_rule(color="#222222", strokeDash=[3, 3]).encode(x="even:Q")
        written = alt.Chart(pd.DataFrame(texts)).encode(y=y)
        columns = [
            written.mark_text(align="left", fontSize=12).encode(
                x=alt.value(x), text=alt.Text(f"{name}:Q", format=".2f")
            )
            for name, x in (("balance", 168), ("confidence", 218))
        ]
        heads = [
            alt.Chart(pd.DataFrame({"text": [name]}))
            .mark_text(align="left", fontSize=11, color="#555555")
            .encode(x=alt.value(x), y=alt.value(-8), text="text:N")
            for name, x in (("balance", 158), ("confidence", 205))
        ]
        panels.append(
            alt.layer(marks, rules, *columns, *heads).properties(
                width=150, height=alt.Step(30), title=alt.Title(network, fontSize=13, offset=20)
            )
        )
    title = alt.Title(
        "Who gets how much?",
        subtitle=[
            "Dashed: where the borders lie if the load is even. Balance: 1 even, 0 all to one expert.",
            "Confidence: the mean probability of the expert that was chosen.",
        ],
    )
    return alt.concat(*panels, columns=2, spacing={"row": 25, "column": 30}).properties(title=title)


def cluster_samples(
    choices: Mapping[str, Tensor], images: Tensor, labels: Tensor, classes: Sequence[str], *, columns: int = 12
) -> alt.LayerChart:
    """What a gateway puts together: some images of each expert, at even steps through them in the order of classes.

    Args:
        choices: int64 [N], the expert of each image, by the name that the menu shows.
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        classes: the names of the labels.
        columns: how many images to show of an expert, at most.
    """
    rows, sizes = [], []
    for name, choice in choices.items():
        for e in range(int(choice.max()) + 1):
            mine = (choice == e).nonzero().flatten()
            mine = mine[labels[mine].argsort(stable=True)]
            sizes.append({"grouped by": name, "expert": e, "text": f"{len(mine)} images"})
            shown = mine[torch.arange(min(columns, len(mine))) * len(mine) // min(columns, len(mine) or 1)]
            rows += [
                {"grouped by": name, "expert": e, "column": i, "class": classes[int(labels[j])], "url": _png(images[j])}
                for i, j in enumerate(shown.tolist())
            ]
    pick = alt.selection_point(
        fields=["grouped by"],
        value=[{"grouped by": next(iter(choices))}],
        bind=alt.binding_select(options=list(choices), name="grouped by  "),
    )
    y = alt.Y("expert:O", title="expert")
    tiles = (
        alt.Chart(pd.DataFrame(rows))
        .transform_filter(pick)
        .mark_image(width=34, height=34)
        .encode(
            x=alt.X("column:O", axis=None, scale=alt.Scale(domain=list(range(columns)))),
            y=y,
            url="url:N",
            tooltip=["class:N", "expert:O"],
        )
        .add_params(pick)
    )
    numbers = (
        alt.Chart(pd.DataFrame(sizes))
        .transform_filter(pick)
        .mark_text(align="left", fontSize=12)
        .encode(x=alt.value(columns * 38 + 8), y=y, text="text:N")
    )
    title = alt.Title(
        "What does the gateway put together?",
        subtitle="Each row: images of one expert, sorted by class and taken at even steps.",
    )
    return (tiles + numbers).properties(width=columns * 38, height=alt.Step(40), title=title)


def _png(image: Tensor) -> str:
    """uint8 [C, H, W] as a data address; one channel or three."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("P", palette=1, colors=16)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def changed_choices(changed: Mapping[str, Mapping[str, float]], *, images: int, title: str) -> alt.LayerChart:
    """The share of images that go to another expert than in float32: multipliers by mixtures.

    Args:
        changed: by multiplier, by mixture, the share in [0, 1].
        images: how many images the shares are of.
        title: of which networks.
    """
    rows = [
        {"multiplier": name.replace("mul8s_1", ""), "mixture": mixture, "share": round(share, 4)}
        for name, shares in changed.items()
        for mixture, share in shares.items()
    ]
    order = [name.replace("mul8s_1", "") for name in changed]
    mixtures = list(next(iter(changed.values())))
    step, angle = (105, 0) if len(mixtures) <= 6 else (55, -40)
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X(
            "mixture:N",
            sort=mixtures,
            title=None,
            axis=alt.Axis(labelAngle=angle, orient="top", ticks=False, domain=False),
        ),
        y=alt.Y("multiplier:N", sort=order, title="multiplier"),
        tooltip=["multiplier", "mixture", alt.Tooltip("share:Q", title="changed", format=".1%")],
    )
    cells = base.mark_rect(stroke="white").encode(
        color=alt.Color("share:Q", scale=alt.Scale(scheme="oranges", domain=[0, 1]), legend=None)
    )
    numbers = base.mark_text(fontSize=13).encode(
        text=alt.Text("share:Q", format=".1%"),
        color=alt.condition("datum.share>0.6", alt.value("white"), alt.value("#222222")),
    )
    heading = alt.Title(title, subtitle=f"Share of {images} test images that go to another expert than in float32.")
    return (cells + numbers).properties(width=alt.Step(step), height=alt.Step(34), title=heading)
