"""The explorer with a kernel: sliders, a catalogue or a table of your own, and at once what that multiplier does.

    explorer()   the widget, for JupyterLab, Notebook 7 and Voila
    Explorer     what is behind it: its controls, and a way to wait until it is still
    Newest       one thread that does the newest of the jobs it is asked for

Pictures and errors come first. The exact rank and the network's accuracy come when they are known, and only if the
sliders still stand where they stood: a number never stays beside another multiplier's name.

Chapter: 00, "Which multiplier would you build?"
"""

import copy
import html
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets

from axmoe_lite import explore
from axmoe_lite.explore import KNOBS, PICKS, Witness
from axmoe_lite.factors import factorise
from axmoe_lite.multipliers import EXACT, Multiplier, errors, multiplier
from axmoe_lite.multipliers.files import read_bytes
from axmoe_lite.plots import live
from axmoe_lite.plots.theme import RED, SKY

CATALOGUE, TABLE = "catalogue", "table"  # the two choices that have no sliders

FAMILIES = {
    "broken_array": ("broken array", "an array of adders with cells left out"),
    "drum": ("DRUM", "multiplies the leading bits of both operands"),
    "roup": ("ROUP", "leaves out digits of the weight and rounds partial products"),
    CATALOGUE: ("catalogue", "published circuits, Mitchell's logarithms and RoBA"),
    TABLE: ("your table", "a multiplier from a file of yours"),
}
KNOB_HINTS = {
    "drop_a": "how many of the activation's lowest bits multiply nothing",
    "drop_b": "how many of the weight's lowest bits multiply nothing",
    "drop_columns": "how many of the product's lowest columns are left out of the sum",
    "drum.k": "how many bits of each operand are multiplied, from its leading one on",
    "roup.k": "how many of the weight's lowest Booth digits are left out",
    "roup.m": "at which bit each partial product is rounded",
}
PREPARING = "Getting a small trained network ready, about ten seconds at first. Errors and prices can be seen already."
NO_TABLE = (
    "Choose a table (.npy .csv .bin .h) of 256 x 256 products, rows for activations -128..127, or a circuit (.c)."
)


@dataclass(frozen=True, eq=False)
class Setting:
    """Where the controls stand.

    Attributes:
        multiplier: what is chosen.
        layer: whose operands are the real ones; "" while no network is ready.
    """

    multiplier: Multiplier
    layer: str


def explorer(seen: Witness | None = None) -> ipywidgets.Widget:
    """The explorer as a widget: show it by making it the last line of a cell.

    Args:
        seen: the network on which multipliers are tried, see :func:`axmoe_lite.explore.witness`; it is copied, so that
            other cells may use it meanwhile. None takes a ResNet-8 on handwritten digits, which gets ready behind the
            widget (about ten seconds) while errors and prices can be explored already.
    """
    return Explorer(seen).box


class Newest:
    """One thread that does the newest of the jobs it is asked for; older ones that still wait are dropped.

    A slider that is dragged asks for more than can be done: what counts is where it stands now.

    Args:
        work: what to do with a job.
        failed: what to do with an error that this raised; the next job is done all the same.

    >>> done = []
    >>> newest = Newest(done.append, print)
    >>> newest.ask(1)
    >>> newest.wait()
    True
    >>> done
    [1]
    """

    def __init__(self, work: Callable[[Any], None], failed: Callable[[Exception], None]) -> None:
        self._work, self._failed = work, failed
        self._lock = threading.Condition()
        self._waiting: list[Any] = []  # at most one
        self._busy = False

    def ask(self, job: Any) -> None:
        """Do this one next, in place of any other that waits. Returns at once."""
        with self._lock:
            self._waiting = [job]
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._run, daemon=True).start()

    def wait(self, seconds: float = 60) -> bool:
        """Wait until nothing is left to do; False if that takes longer."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._busy, timeout=seconds)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    self._lock.notify_all()
                    return
                job = self._waiting.pop()
            try:
                self._work(job)
            except Exception as wrong:
                self._failed(wrong)


class Explorer:
    """The explorer's controls and what they set off.

    Args:
        seen: as for :func:`explorer`.

    Attributes:
        box: the widget that holds all others.
        family, knobs, pick, upload, layer: the controls; ``knobs`` by family and parameter.
        message, numbers, pictures: what they show, as HTML.
    """

    def __init__(self, seen: Witness | None = None) -> None:
        self._seen: Witness | None = None
        self._accuracies: dict[str, float] = {}  # by the table's digest: what was tried is not tried again
        self._table: Multiplier | None = None
        self._asked: Setting | None = None
        self._shown: Setting | None = None
        self._showing = threading.Lock()
        self._drawer, self._trier, self._preparer = (
            Newest(work, self._failed) for work in (self._draw, self._try, self._prepare)
        )
        self._make_controls()
        self._make_views()
        left = ipywidgets.VBox([self.controls, self.layer, self.message], layout={"width": "350px"})
        both = ipywidgets.HBox([left, self.numbers], layout={"flex_flow": "row wrap", "grid_gap": "12px"})
        style = ipywidgets.HTML(_STYLE, layout={"height": "0px", "margin": "0"})
        self.box = ipywidgets.VBox([style, self.family, both, self.pictures])
        self._changed()
        self._say(PREPARING)
        self._preparer.ask(seen)

    def wait(self, seconds: float = 60) -> bool:
        """Wait until all that was asked for is shown; False if that takes longer."""
        end = time.monotonic() + seconds
        return all(one.wait(max(0, end - time.monotonic())) for one in (self._preparer, self._drawer, self._trier))

    # ------------------------------------------------------------------------ controls

    def _make_controls(self) -> None:
        self.family = ipywidgets.ToggleButtons(
            options=[(label, family) for family, (label, _) in FAMILIES.items()],
            tooltips=[hint for _, hint in FAMILIES.values()],
            style={"button_width": "auto"},
        )
        self.knobs = {
            family: {
                name: ipywidgets.IntSlider(
                    value=first,
                    min=least,
                    max=most,
                    description=name,
                    tooltip=KNOB_HINTS.get(name) or KNOB_HINTS[f"{family}.{name}"],
                    style={"description_width": "96px"},
                    layout={"width": "320px"},
                )
                for name, (least, most, first) in knobs.items()
            }
            for family, knobs in KNOBS.items()
        }
        wide = {"style": {"description_width": "96px"}, "layout": {"width": "320px"}}
        self.pick = ipywidgets.Dropdown(options=list(PICKS), value="mul8s_1KVA", description="circuit", **wide)
        self.upload = ipywidgets.FileUpload(accept=".npy,.csv,.bin,.h,.c", multiple=False, description="choose a file")
        self.upload.layout.width = "320px"
        self.layer = ipywidgets.Dropdown(options=[("(not ready)", "")], description="layer", **wide)
        self.controls = ipywidgets.VBox(layout={"height": "118px", "overflow": "hidden"})
        for one in (self.family, self.pick, self.layer, *(k for knobs in self.knobs.values() for k in knobs.values())):
            one.observe(lambda _: self._changed(), "value")
        self.upload.observe(lambda change: self._uploaded(change["new"]), "value")

    def _make_views(self) -> None:
        self.numbers, self.pictures, self.message = (ipywidgets.HTML() for _ in range(3))
        # Heights are given, so that nothing below moves while something above is drawn.
        self.numbers.layout.height = "262px"
        self.pictures.layout.min_height = f"{live.HEIGHT + 8}px"
        self.message.layout = {"height": "96px", "overflow": "auto"}

    # ----------------------------------------------------------------------- what is asked

    def _changed(self) -> None:
        """A control was moved: find what it stands for, and ask for it."""
        family = self.family.value
        shown = {CATALOGUE: [self.pick], TABLE: [self.upload]}.get(family) or list(self.knobs[family].values())
        if list(self.controls.children) != shown:
            self.controls.children = shown
        if self._seen is not None:
            self._say("")
        if family == TABLE and self._table is None:
            self._say(NO_TABLE)
        wanted, there = Setting(self._chosen(family), self.layer.value or ""), self._asked
        if there is None or (wanted.multiplier, wanted.layer) != (there.multiplier, there.layer):
            self._asked = wanted
            self._drawer.ask(wanted)

    def _chosen(self, family: str) -> Multiplier:
        if family == TABLE:
            return self._table or self._asked.multiplier  # without a table all stays as it was
        if family == CATALOGUE:
            return multiplier(self.pick.value)
        return multiplier(explore.name_of(family, {name: knob.value for name, knob in self.knobs[family].items()}))

    def _uploaded(self, files: tuple) -> None:
        """A file was chosen: it becomes the multiplier, or the message says why not and all stays as it was."""
        if not files:
            return
        name = files[-1]["name"]
        try:
            self._table = read_bytes(bytes(files[-1]["content"]), filename=name)
        except ValueError as wrong:
            self._say(f"Not taken: {wrong}", wrong=True)
            return
        self._changed()

    def _say(self, text: str, *, wrong: bool = False) -> None:
        kind = "axmoe-wrong" if wrong else "axmoe-hint"
        self.message.value = f'<div class="{kind}" role="status">{html.escape(text)}</div>'

    # ------------------------------------------------------------------------- what is done

    def _prepare(self, seen: Witness | None) -> None:
        """Get a network of its own, and try it once: loops are compiled at their first use."""
        seen = seen or explore.digits_witness()
        own = replace(seen, network=copy.deepcopy(seen.network))
        exact = multiplier(EXACT)
        self._accuracies[exact.digest] = explore.accuracy(exact, own)
        self._seen = own
        self.layer.options = list(own.operands)  # chooses the first, and so asks for where the controls stand
        if PREPARING in self.message.value:
            self._say("")

    def _draw(self, setting: Setting) -> None:
        """Errors and pictures, at once; of the newest setting also what takes longer."""
        told = quick_look(setting.multiplier, self._seen, layer=setting.layer)
        pictures = _pictures(setting.multiplier, self._seen, told)
        with self._showing:
            self._shown = setting
            self.pictures.value, self.numbers.value = pictures, self._table_of(told)
        if self._asked is setting:
            self._trier.ask((setting, told))

    def _try(self, asked: tuple[Setting, dict[str, object]]) -> None:
        """The exact rank, then the network's accuracy."""
        setting, told = asked
        m = setting.multiplier
        told["rank"] = factorise(m).rank
        self._show(setting, told)
        if self._seen is None or self._asked is not setting:
            return
        if m.digest not in self._accuracies:
            self._accuracies[m.digest] = explore.accuracy(m, self._seen)
        told["top1"] = self._accuracies[m.digest]
        self._show(setting, told)

    def _show(self, setting: Setting, told: dict[str, object]) -> None:
        with self._showing:
            if self._shown is setting:  # else these are the numbers of what was there before
                self.numbers.value = self._table_of(told)

    def _table_of(self, told: dict[str, object]) -> str:
        exact = self._accuracies.get(multiplier(EXACT).digest)
        return numbers_table(told, exact=exact, images=len(self._seen.images.x_test) if self._seen else None)

    def _failed(self, wrong: Exception) -> None:
        self._say(f"This did not work: {wrong}", wrong=True)


# ---------------------------------------------------------------------------- what it says


def quick_look(m: Multiplier, seen: Witness | None = None, *, layer: str = "") -> dict[str, object]:
    """What is known of a multiplier at once: :func:`axmoe_lite.explore.look` with None for the rank and the accuracy.

    Args:
        seen, layer: whose operands are the real ones; without either the real errors are None too.

    >>> quick_look(multiplier("mul8s_1KVM"))["wce"]
    128
    """
    uniform = errors(m)
    real = None
    if seen is not None and layer:
        a, b = seen.operands[layer]
        real = errors(m, a=a, b=b)
    return {
        "multiplier": m.name,
        "power_mw": m.power_mw,
        "proxy": m.is_proxy,
        "rank": None,
        "mae": uniform.mae,
        "wce": uniform.wce,
        "ep": uniform.ep,
        "bias": uniform.mean_error,
        "layer": layer or None,
        "real_mae": real and real.mae,
        "real_bias": real and real.mean_error,
        "top1": None,
    }


def numbers_table(told: dict[str, object], *, exact: float | None = None, images: int | None = None) -> str:
    """The numbers as an HTML table; every cell with a number carries its full value in ``data-value``.

    Args:
        told: what :func:`quick_look` or :func:`axmoe_lite.explore.look` found; None shows as a dot that waits.
        exact: the network's accuracy under the exact circuit, in [0, 1].
        images: how many images the accuracy is of.

    >>> '<td data-figure="wce" data-value="128">128</td>' in numbers_table(quick_look(multiplier("mul8s_1KVM")))
    True
    """
    rank = told["rank"]
    products = "ordinary product" if rank == 1 else "ordinary products"
    told_of = f" of {images} images" if images and told["top1"] is not None else ""
    beside = "" if exact is None else f"exact circuit: {exact:.1%}"
    lines = [
        ("power", _power_cell(told), "", ""),
        ("simulated exactly by", _cell("rank", rank, f"{rank} {products}"), "", ""),
        ("", "<th>all pairs alike</th>", f"<th>in {html.escape(str(told['layer'] or 'a layer'))}</th>", ""),
        ("mean |error|", _number("mae", told, ",.1f"), _number("real_mae", told, ",.1f"), ""),
        ("bias", _number("bias", told, "+,.2f"), _number("real_bias", told, "+,.2f"), ""),
        ("worst error", _number("wce", told, ",d"), "<td></td>", ""),
        ("wrong products", _number("ep", told, ".1%"), "<td></td>", ""),
        ("network's top-1", _number("top1", told, ".1%", after=told_of), f"<td>{beside}</td>", "axmoe-main"),
    ]
    rows = "".join(f'<tr class="{kind}"><th>{head}</th>{one}{two}</tr>' for head, one, two, kind in lines)
    name = html.escape(str(told["multiplier"]))
    return f'<table class="axmoe-numbers" data-multiplier="{name}"><caption>{name}</caption>{_COLUMNS}{rows}</table>'


# Given widths: no column moves when a longer number comes.
_COLUMNS = '<colgroup><col style="width:160px"><col style="width:225px"><col style="width:195px"></colgroup>'


def _cell(figure: str, value: object, text: str, *, columns: int = 1) -> str:
    shown = f'data-value="{value}">{text}' if value is not None else ">…"
    span = f' colspan="{columns}"' if columns > 1 else ""
    return f'<td data-figure="{figure}"{span} {shown}</td>'.replace(" >", ">")


def _number(figure: str, told: dict[str, object], form: str, *, after: str = "") -> str:
    value = told[figure]
    return _cell(figure, value, "" if value is None else f"{value:{form}}".replace("-", "−") + after)


def _power_cell(told: dict[str, object]) -> str:
    power = told["power_mw"]
    if power is None:
        return '<td data-figure="power_mw" colspan="2">unknown</td>'
    origin = "a proxy" if told["proxy"] else "published"
    text = f"{power / live.exact_power_mw():.0%} of the exact circuit ({power:.3f} mW, {origin})"
    return _cell("power_mw", power, text, columns=2)


def _pictures(m: Multiplier, seen: Witness | None, told: dict[str, object]) -> str:
    """The three pictures side by side, each with its numbers in words."""
    layer = told["layer"] or ""
    operands = seen.operands[layer] if seen is not None and layer else None
    size = f"mean absolute error {told['mae']:.1f}, bias {told['bias']:+.1f}"
    real = "" if operands is None else f"; as {layer} meets them {told['real_mae']:.1f} and {told['real_bias']:+.1f}"
    power = told["power_mw"]
    price = "power unknown" if power is None else f"{power / live.exact_power_mw():.0%} of the exact circuit's power"
    drawn = (
        live.picture(live.error_map_of(m), says=f"Error map of {m.name}: {size}, worst error {told['wce']}."),
        live.picture(
            live.error_histogram(m, operands, layer=layer),
            says=f"Histogram of the errors of {m.name}: {told['ep']:.0%} of products wrong, {size}{real}.",
        ),
        live.picture(
            live.power_place(m),
            says=f"Power against error: {m.name} has {price} and a mean absolute error of {told['mae']:.1f}.",
        ),
    )
    return f'<div class="axmoe-pictures">{"".join(drawn)}</div>'


_STYLE = f"""<style>
.axmoe-pictures {{ display: flex; flex-wrap: wrap; gap: 8px }}
.axmoe-pictures img {{ background: white; width: {live.WIDTH}px; height: {live.HEIGHT}px; max-width: none; margin: 0 }}
table.axmoe-numbers {{ border-collapse: collapse;
  font-size: 14px; line-height: 1.5; table-layout: fixed; width: 580px }}
.axmoe-numbers caption {{ text-align: left; font-size: 17px; font-weight: bold; caption-side: top; padding: 0 0 4px }}
.axmoe-numbers th, .axmoe-numbers td {{ text-align: left; padding: 1px 14px 1px 0; font-weight: normal }}
.axmoe-numbers td {{ font-variant-numeric: tabular-nums }}
.axmoe-numbers td + th, .axmoe-numbers th + th {{ font-size: 12px; opacity: 0.8 }}
.axmoe-main td:nth-child(2) {{ font-size: 17px; font-weight: bold }}
.axmoe-hint, .axmoe-wrong {{ font-size: 13px; line-height: 1.4; padding: 2px 8px }}
.axmoe-wrong {{ border-left: 5px solid {RED} }}
.axmoe-hint:not(:empty) {{ border-left: 5px solid {SKY} }}
</style>"""
