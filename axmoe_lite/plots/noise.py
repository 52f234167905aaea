"""How much noise a layer bears: errors foretold and counted, what each layer learned, what it buys.

    predictions        predicted against simulated standard deviation, a mark a layer and circuit
    tolerance_bars     what noise each layer bears, for several lambdas, and how much of the work it does
    noise_fronts       multiplication energy saved against points of top-1 lost

Chapter: 14, "How much noise can a layer bear?"
"""

import math
from collections.abc import Iterable, Mapping

import altair as alt
import pandas as pd

from axmoe_lite import cost
from axmoe_lite.multipliers import EXACT
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, check_evidence

REFERENCE = "not retrained"
"""The regime whose exact network :func:`noise_fronts` counts lost points from, where a regime has none of its own."""

ROOM = 0.06  # of the energy axis, for a name

_TOLD = ["n_train", "n_test", "seed", "epochs", "noise_epochs", "noise_images", "retrain_epochs", "retrain_images"]
_TOLD += ["commit", "date", "device", "scale"]
_MODELS = {"multi": ("circle", BLUE), "single": ("square", ORANGE), "monte carlo": ("cross", PURPLE)}
_FAMILIES = {
    "matched": ("circle", BLUE, "matched, weights trained under noise"),
    "matched, exact weights": ("square", ORANGE, "matched, weights trained exactly"),
    "uniform": ("diamond", GREY, "one circuit for all layers"),
}
_STEPS = tuple(  # of lambda, the least first
    zip(
        ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross"),
        (BLUE, ORANGE, GREEN, RED, PURPLE, GREY),
        strict=True,
    )
)
_CLAIM = {"low": 0.70, "high": 0.79, "none": 0.0, "most": 1.0}  # AGN: 70 to 79 % saved, under 1 point lost


def predictions(
    predicted: Mapping[str, Mapping[str, Mapping[str, float]]],
    simulated: Mapping[str, Mapping[str, float]],
    *,
    title: str = "Does the prediction hold?",
) -> alt.LayerChart:
    """Predicted against simulated standard deviation of a layer's sums, both logarithmic; on the line they agree.

    A click in the legend picks models. Pairs without an error on either side have no logarithm and are left out; the
    subtitle counts them.

    Args:
        predicted: model, one of :data:`axmoe_lite.search.predict.MODELS`, to layer to multiplier to a number, as
            :func:`~axmoe_lite.search.predict.predicted_std` returns each, in units of the integer product.
        simulated: layer to multiplier to a number, of :func:`~axmoe_lite.search.predict.simulated_std`.

    Raises:
        ValueError: for no or an unknown model, other pairs than the simulated ones, or no pair with an error.
    """
    wanted = {(layer, name) for layer, row in simulated.items() for name in row}
    rows = []
    for model, found in predicted.items():
        if model not in _MODELS:
            raise ValueError(f"No model is called {model!r}; there are {', '.join(_MODELS)}.")
        have = {(layer, name) for layer, row in found.items() for name in row}
        if have != wanted:
            layer, name = sorted(have ^ wanted)[0]
            raise ValueError(f"Layer {layer!r} with {name!r} is not both predicted ({model}) and simulated.")
        rows += [
            {"model": model, "layer": layer, "multiplier": name, "predicted": found[layer][name], "simulated": truth}
            for layer, row in simulated.items()
            for name, truth in row.items()
        ]
    shown = [row for row in rows if row["predicted"] > 0 and row["simulated"] > 0]
    if not shown:
        raise ValueError("predictions() was given no pair that errs on both sides; there is nothing to draw.")
    left = len(rows) - len(shown)
    return _scatter(shown, list(predicted), title, f" {left} marks without an error are left out." if left else "")


def _scatter(rows: list[dict], models: list[str], title: str, note: str) -> alt.LayerChart:
    table = pd.DataFrame(rows)
    table["ratio"] = table["predicted"] / table["simulated"]
    ends = [float(f(f(table["predicted"]), f(table["simulated"]))) for f in (min, max)]
    low, high = ends[0] / 1.3, ends[1] * 1.3
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    ticks = [10.0**n for n in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    axis = alt.Axis(values=ticks, format="~s")
    x = alt.X("simulated:Q", title="simulated: every product computed (units of the integer product)", scale=scale)
    y = alt.Y("predicted:Q", title="predicted (same units)", scale=scale, axis=axis)
    pick = alt.selection_point(name="predictions_model", fields=["model"], bind="legend")
    shapes, colours = zip(*(_MODELS[model] for model in models), strict=True)
    legend = alt.Legend(orient="top", symbolStrokeWidth=1.6)
    marks = (
        alt.Chart(table)
        .mark_point(size=42, strokeWidth=1.3, filled=False)
        .encode(
            x=x.axis(axis),
            y=y,
            color=alt.Color("model:N", title=None, scale=alt.Scale(domain=models, range=list(colours)), legend=legend),
            shape=alt.Shape("model:N", title=None, scale=alt.Scale(domain=models, range=list(shapes)), legend=legend),
            opacity=alt.condition(pick, alt.value(0.9), alt.value(0.06)),
            tooltip=[
                *("model", "layer", "multiplier"),
                *(alt.Tooltip(f"{name}:Q", format=".4~g") for name in ("predicted", "simulated")),
                alt.Tooltip("ratio:Q", title="predicted / simulated", format=".2f"),
            ],
        )
        .add_params(pick)
    )
    line = alt.Chart(pd.DataFrame({"simulated": [low, high], "predicted": [low, high]})).mark_line(
        color="#555", strokeDash=[5, 4], strokeWidth=1.2
    )
    layers, circuits = table["layer"].nunique(), table["multiplier"].nunique()
    heading = alt.Title(
        title, subtitle=f"A mark: one of {layers} layers under one of {circuits} circuits. Dashed: agreement.{note}"
    )
    # The marks first: in a layered chart only the first layer's legend listens.
    return alt.layer(marks, line.encode(x="simulated:Q", y="predicted:Q")).properties(
        width=400, height=400, title=heading
    )


def tolerance_bars(
    sigma: Mapping[float, Mapping[str, float]],
    macs: cost.Macs,
    *,
    sigma_max: float = 0.5,
    title: str = "How much noise does each layer bear?",
) -> alt.HConcatChart:
    """Left: sigma of each layer, a mark for each lambda. Right: which share of the products the layer computes.

    A click in the legend picks lambdas.

    Args:
        sigma: lambda to layer to the standard deviation that it bears, as a share of its signal's, see
            :func:`axmoe_lite.search.tolerances`.
        macs: of the network, from :func:`axmoe_lite.cost.count`; shares are of all its layers.
        sigma_max: where sigma was cut: a dashed line.

    Raises:
        ValueError: for no lambda, more than six, lambdas of different layers, a layer that was not counted, or a
            sigma beyond sigma_max.
    """
    if not 1 <= len(sigma) <= len(_STEPS):
        raise ValueError(f"{len(sigma)} lambdas are to be drawn; it can be 1 to {len(_STEPS)}.")
    layers, rows = list(next(iter(sigma.values()))), []
    for lam, found in sigma.items():
        if set(found) != set(layers):
            raise ValueError(f"lambda {lam} has the layers {', '.join(found)}; the first one has {', '.join(layers)}.")
        for layer, value in found.items():
            if layer not in macs.layers:
                raise ValueError(
                    f"Layer {layer!r} has a sigma but was not counted; there are {', '.join(macs.layers)}."
                )
            if not 0 <= value <= sigma_max:
                raise ValueError(f"sigma of {layer!r} is {value}; it must lie within 0 and sigma_max, {sigma_max}.")
            share = macs.layers[layer].executed / macs.executed
            rows.append({"layer": layer, "lambda": f"{lam:g}", "sigma": value, "share": share})
    table, names = pd.DataFrame(rows), [f"{lam:g}" for lam in sorted(sigma)]
    y = alt.Y("layer:N", title=None, sort=layers, axis=alt.Axis(labelLimit=200, grid=True))
    pick = alt.selection_point(name="tolerance_lambda", fields=["lambda"], bind="legend")
    steps = [_STEPS[i] for i in range(len(names))]
    legend = alt.Legend(orient="top", title="lambda", symbolStrokeWidth=1.6)
    marks = (
        alt.Chart(table)
        .mark_point(size=80, filled=True)
        .encode(
            x=alt.X(
                "sigma:Q",
                title="sigma: noise borne, % of the signal's deviation",
                axis=alt.Axis(format="%"),
                scale=alt.Scale(domain=[0, sigma_max * 1.04], nice=False),
            ),
            y=y,
            color=alt.Color("lambda:N", scale=alt.Scale(domain=names, range=[c for _, c in steps]), legend=legend),
            shape=alt.Shape("lambda:N", scale=alt.Scale(domain=names, range=[s for s, _ in steps]), legend=legend),
            opacity=alt.condition(pick, alt.value(0.95), alt.value(0.1)),
            tooltip=["layer", "lambda:N", alt.Tooltip("sigma:Q", format=".1%"), _share_tip()],
        )
        .add_params(pick)
    )
    cut = alt.Chart(pd.DataFrame({"sigma": [sigma_max]})).mark_rule(color="#555", strokeDash=[5, 4]).encode(x="sigma:Q")
    left = alt.layer(marks, cut).properties(width=330, height=alt.Step(24))
    bars = (
        alt.Chart(table.drop_duplicates("layer")[["layer", "share"]])
        .mark_bar(color="#bbb")
        .encode(
            x=alt.X("share:Q", title="share of the products", axis=alt.Axis(format="%", tickCount=4)),
            y=alt.Y("layer:N", sort=layers, axis=None),
            tooltip=["layer", _share_tip()],
        )
        .properties(width=120, height=alt.Step(24))
    )
    heading = alt.Title(title, subtitle=f"Dashed: sigma_max, beyond which nothing is won ({sigma_max:.0%}).")
    return alt.hconcat(left, bars, spacing=14).properties(title=heading)


def _share_tip() -> alt.Tooltip:
    return alt.Tooltip("share:Q", title="share of the products", format=".1%")


def noise_fronts(rows: Iterable[Mapping], *, title: str = "What does the noise buy?") -> alt.LayerChart:
    """Multiplication energy saved against points of top-1 lost to the 8-bit exact network of the same regime.

    What is retrained is counted from the exact network retrained alike: more training is no merit of a circuit.

    Buttons pick the regime, retrained at first where there is such a row, the legend a family. The line joins the
    assignments that were matched to learned noise. The box is AGN's claim, on another data set. Fewer lost is higher.

    Args:
        rows: of one network, image set, seed and scale, with ``family`` (``"matched"``, ``"matched, exact weights"`` or
            ``"uniform"``), ``setting`` (lambda, or a circuit's name), ``regime``, ``saved`` and ``top1`` in [0, 1], and
            evidence; numbers or text. Among them the exact circuit for all layers, not retrained: the reference of
            each regime that has no such row itself.

    Raises:
        ValueError: for no rows, a row without evidence, of an unknown family or beyond [0, 1], rows of several studies,
            or no reference.
    """
    table = _lost([dict(row) for row in rows])
    regimes = list(dict.fromkeys(table["regime"]))
    start = "retrained" if "retrained" in regimes else regimes[-1]
    bind = {"bind": alt.binding_radio(options=regimes, name="regime  ")} if len(regimes) > 1 else {}
    buttons = alt.param("noise_regime", value=start, **bind)
    pick = alt.selection_point(name="noise_family", fields=["kind"], bind="legend")
    base = alt.Chart(table).transform_filter("datum.regime==noise_regime")
    shown = [_FAMILIES[name] for name in _FAMILIES if name in set(table["family"])]
    shapes, colours, names = (list(part) for part in zip(*shown, strict=True))
    legend = alt.Legend(orient="top", columns=2, labelLimit=300)
    faint = alt.condition(pick, alt.value(1), alt.value(0.1))
    x = alt.X(
        "saved:Q",
        title="multiplication energy saved (8-bit exact network = 0)",
        axis=alt.Axis(format="%"),
        scale=alt.Scale(domain=[-0.02, 0.92], nice=False),
    )
    y = alt.Y(
        "lost:Q",
        title="points of top-1 lost, test images (fewer is higher)",
        axis=alt.Axis(tickCount=7),
        scale=alt.Scale(reverse=True, zero=False, padding=16),
    )
    colour = alt.Color("kind:N", title=None, scale=alt.Scale(domain=names, range=colours), legend=legend)
    marks = base.mark_point(size=85, filled=False, strokeWidth=2.2).encode(
        x=x,
        y=y,
        color=colour,
        shape=alt.Shape("kind:N", title=None, scale=alt.Scale(domain=names, range=shapes), legend=legend),
        opacity=faint,
        tooltip=[
            *(
                alt.Tooltip(f"{name}:N", title=told)
                for name, told in (("kind", "what"), ("setting", "lambda, circuit"))
            ),
            alt.Tooltip("saved:Q", title="energy saved", format=".1%"),
            alt.Tooltip("lost:Q", title="points lost", format=".2f"),
            alt.Tooltip("top1:Q", title="top-1", format=".2%"),
            alt.Tooltip("regime:N"),
            *(alt.Tooltip(f"{name}:N", title=name.replace("_", " ")) for name in ("dataset", *_TOLD) if name in table),
        ],
    )
    line = base.transform_filter("datum.family=='matched'").mark_line(strokeWidth=1.4, color=BLUE)
    labels = [
        base.transform_filter(f"datum.family=='{family}'")
        .mark_text(fontSize=11, dy=dy, align=align, dx=dx)
        .encode(x=x, y=y, text="label:N", opacity=faint, color=alt.value(shade))
        for family, dy, dx, align, shade in (("matched", 15, 0, "center", BLUE), ("uniform", -12, 0, "center", "#555"))
    ]
    first, exact = table.iloc[0], dict(zip(table["regime"], table["reference"], strict=True))
    subtitle = [
        f"{first['network']}, {first['dataset']}, {first['n_test']} test images, seed {first['seed']}"
        f" ({first['scale']}).",
        f"The 8-bit exact network: {', '.join(f'{top1:.2%} {regime}' for regime, top1 in exact.items())}.",
        "Box: AGN's claim, 70 to 79 % saved for under 1 point, ResNet-8 to 32 on CIFAR-10: a reference, not a test.",
    ]
    # The marks first: in a layered chart only the first layer's legend listens.
    chart = alt.layer(marks.add_params(pick), *_claim(), line.encode(x=x, y=y, order="saved:Q", opacity=faint), *labels)
    heading = alt.Title(title, subtitle=subtitle)
    return chart.add_params(buttons).properties(width=520, height=340, title=heading)


def _claim() -> list[alt.Chart]:
    """AGN's claim: a pale box from 0 to 1 point lost, and its name."""
    base = alt.Chart(pd.DataFrame([_CLAIM]))
    ends = {"x": "low:Q", "x2": "high:Q", "y": "none:Q"}
    box = base.mark_rect(color=SKY, opacity=0.3, stroke="#555", strokeDash=[3, 3], strokeWidth=0.8)
    return [box.encode(**ends, y2="most:Q")]


def _lost(rows: list[dict]) -> pd.DataFrame:
    """The rows with what each lost to the reference, points, and what it is called in the figure."""
    if not rows:
        raise ValueError("noise_fronts() was given no rows; chapter 14 makes them.")
    check_evidence(rows, "setting")
    for row in rows:
        if row["family"] not in _FAMILIES:
            raise ValueError(f"No family is called {row['family']!r}; there are {', '.join(_FAMILIES)}.")
        for name in ("saved", "top1"):
            if not 0 <= float(row[name]) <= 1:
                raise ValueError(f"{name} of {row['setting']!r} is {row[name]}; it lies in [0, 1].")
    for name in ("network", "dataset", "n_train", "n_test", "seed", "epochs", "scale", "model"):
        found = dict.fromkeys(str(row.get(name, "")) for row in rows)
        if len(found) > 1:
            raise ValueError(f"The rows have {name} = {', '.join(found)}; draw one study at a time.")
    reference = {r["regime"]: float(r["top1"]) for r in rows if r["setting"] == EXACT}
    if REFERENCE not in reference:
        raise ValueError(f"No row is {EXACT!r}, {REFERENCE!r}: what would points be lost from?")
    table = pd.DataFrame(rows).astype({"saved": float, "top1": float, "setting": str})
    table["reference"] = [reference.get(regime, reference[REFERENCE]) for regime in table["regime"]]
    table["lost"] = (100 * (table["reference"] - table["top1"])).round(4)
    trained = {"noise_": table["family"] == "matched", "retrain_": table["regime"] == "retrained"}
    for name in (name for name in _TOLD if name in table):  # said of the whole study, but not true of each row
        for start, where in trained.items():
            if name.startswith(start):
                table[name] = table[name].astype(str).where(where, "none")
    table["kind"] = [_FAMILIES[family][2] for family in table["family"]]
    table["label"] = [
        setting.replace("mul8s_1", "") if family == "uniform" else f"λ {setting}"
        for family, setting in zip(table["family"], table["setting"], strict=True)
    ]
    for _, marks in table.sort_values(["saved", "lost"]).groupby(["family", "regime"]):
        last = -1.0
        for place, mark in marks.iterrows():  # a name where there is room for it; the hover has the others
            crowded = mark["saved"] - last < ROOM
            last = last if crowded else mark["saved"]
            table.loc[place, "label"] = "" if crowded else mark["label"]
    kept = ["network", "family", "setting", "regime", "saved", "top1", "reference", "lost", "kind", "label", "dataset"]
    return table[[name for name in (*kept, *_TOLD) if name in table]]
