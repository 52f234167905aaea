"""The search itself, which knows no network: groups choose multipliers, somebody scores and prices the choice.

Chapter: 12, "A multiplier for each expert?"
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from axmoe_lite import moe
from axmoe_lite.layers import approximable
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.search import additive
from axmoe_lite.search.trial import Found, Score, front

OBJECTIVES = ("divergence", "loss")
BROKEN = 0.5  # below this share of the exact circuit's accuracy nothing is refined any more


def explore(
    groups: dict[str, list[str]],
    multipliers: Iterable[str],
    *,
    evaluate: Callable[[dict[str, str]], Score],
    price: Callable[[dict[str, str]], float],
    candidates: int = 16,
    refine: int = 32,
    budget: int | None = None,
    objective: str = "divergence",
    seed: int = 0,
    progress: bool = True,
) -> list[Found]:
    """:func:`search` without a network: only a way to score an assignment, and one to price it.

    First each group under each multiplier alone. Then the front that these sensitivities foretell if they add up
    (:func:`axmoe_lite.search.additive.front`), of which some are measured, and every uniform assignment. Then moves:
    a member of the measured front changes one group's multiplier, to what promises most by the sensitivities.

    Args:
        groups: name to layers, each layer in one group.
        multipliers: names.
        evaluate: an assignment's :class:`Score`.
        price: its cost, a sum over layers.
        candidates: how many of the foretold front are measured.
        refine: how many moves are measured.
        budget: networks to run altogether; moves go on until then, instead of ``refine`` of them. With it, searches
            with many and with few groups have the same effort. Less is run only where no member of the front has a
            neighbour left that was not measured.
        objective: ``"divergence"`` or ``"loss"``: what is to be small.
        seed: of the order of the moves.

    Returns:
        The measured front, from the cheapest to the dearest.

    >>> loss = {"mul8s_1KV6": 0.0, "mul8s_1L2J": 1.0}
    >>> score = lambda chosen: Score(0.0, loss[chosen["a"]] + 9 * loss[chosen["b"]], 1.0)
    >>> power = lambda chosen: sum(multiplier(name).power_mw for name in chosen.values())
    >>> found = explore({"a": ["a"], "b": ["b"]}, loss, evaluate=score, price=power, progress=False)
    >>> [(one.assignment["a"][-2:], one.assignment["b"][-2:], one.divergence) for one in found]
    [('2J', '2J', 10.0), ('2J', 'V6', 1.0), ('V6', 'V6', 0.0)]
    """
    names = catalogue(multipliers)
    check_options(groups, names, candidates=candidates, refine=refine, budget=budget, objective=objective)
    room = budget if budget is not None else _needed(groups, names, candidates) + refine
    space = _Space(groups, names, evaluate, price, objective, room, tqdm(total=room, disable=not progress))
    try:
        space.single_changes()
        foretold = additive.front(space.cost, space.more)
        for choice in foretold[additive.spread(space.cost_of(foretold), candidates)]:
            space.measure(choice)
        for m in range(len(names)):
            space.measure(np.full(len(groups), m))
        space.move(np.random.default_rng(seed))
    finally:
        space.bar.close()
    return space.front()


class _Space:
    """All choices, int64 [G] each; what is known of them, and what may still be asked."""

    def __init__(
        self,
        groups: dict[str, list[str]],
        names: list[str],
        evaluate: Callable,
        price: Callable,
        objective: str,
        room: int,
        bar: tqdm,
    ) -> None:
        self.groups, self.names, self.room, self.bar = groups, names, room, bar
        self._evaluate, self._objective = evaluate, objective
        self._price = price
        self.scores: dict[tuple[int, ...], Score] = {}
        self.exact = np.zeros(len(groups), int)
        self.least = price(self.assignment(self.exact))
        self.cost = np.array(
            [[price(self.assignment(c)) - self.least for c in self._row(g)] for g in range(len(groups))]
        )
        self.more = np.zeros_like(self.cost)

    def _row(self, g: int) -> list[np.ndarray]:
        """The exact circuit everywhere but in one group, there each multiplier in turn."""
        rows = np.repeat(self.exact[None], len(self.names), 0)
        rows[:, g] = range(len(self.names))
        return list(rows)

    def assignment(self, choice: np.ndarray) -> dict[str, str]:
        pairs = zip(self.groups.values(), choice, strict=True)
        return {layer: self.names[m] for layers, m in pairs for layer in layers}

    def cost_of(self, choices: np.ndarray) -> np.ndarray:
        return self.least + self.cost[np.arange(len(self.groups)), choices].sum(-1)

    def measure(self, choice: np.ndarray) -> float:
        key = tuple(int(m) for m in choice)
        if key not in self.scores:
            self.scores[key] = self._evaluate(self.assignment(choice))
            self.bar.update()
        return getattr(self.scores[key], self._objective)

    def single_changes(self) -> None:
        self.bar.set_description("sensitivities")
        start = self.measure(self.exact)
        if not np.isfinite(start):
            raise ValueError(f"Under the exact circuit {EXACT} the scores are no numbers; nothing can be built on it.")
        for g in range(len(self.groups)):
            self.more[g] = [self.measure(choice) - start for choice in self._row(g)]
        self.bar.set_description("candidates")

    def known(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The measured front: choices [S, G], costs [S] and losses [S]."""
        choices = np.array(list(self.scores))
        losses = np.array([getattr(score, self._objective) for score in self.scores.values()])
        costs = self.cost_of(choices)
        kept = additive.undominated(costs.round(12), losses)  # equal sums may differ in their last bits
        return choices[kept], costs[kept], losses[kept]

    def move(self, draw: np.random.Generator) -> None:
        """In rounds, each member of the front in turn makes its most promising move, until the room is used up."""
        self.bar.set_description("moves")
        enough, moved = BROKEN * self.scores[tuple(self.exact)].accuracy, True
        while moved and len(self.scores) < self.room:
            moved = False
            choices, costs, losses = self.known()
            for s in draw.permutation(len(choices)):
                if self.scores[tuple(choices[s])].accuracy >= enough and len(self.scores) < self.room:
                    moved |= self._best_move(choices[s], costs[s], losses[s], costs, losses)

    def _best_move(self, choice: np.ndarray, paid: float, lost: float, costs: np.ndarray, losses: np.ndarray) -> bool:
        all_groups = np.arange(len(self.groups))
        new_cost = paid + self.cost - self.cost[all_groups, choice][:, None]
        with np.errstate(invalid="ignore"):  # what breaks alone and does not here is not known: it comes last
            new_loss = lost + self.more - self.more[all_groups, choice][:, None]
            hope = np.nan_to_num(additive.promise(new_cost, new_loss, costs, losses), nan=-np.inf)
        for place in np.argsort(-hope, axis=None, kind="stable"):
            g, m = np.unravel_index(place, hope.shape)
            changed = choice.copy()
            changed[g] = m
            if tuple(int(v) for v in changed) not in self.scores:
                self.measure(changed)
                return True
        return False

    def front(self) -> list[Found]:
        chosen = [self.assignment(choice) for choice in self.scores]
        measured = zip(chosen, map(self._price, chosen), self.scores.values(), strict=True)
        return front(measured, objective=self._objective, evaluated=len(self.scores))


def catalogue(multipliers: Iterable[str], *, exact: bool = True) -> list[str]:
    """Their names, once each, the exact circuit first if it is wanted; all exist and have a power."""
    if isinstance(multipliers, str) or not isinstance(multipliers, Iterable):
        kind = "text" if isinstance(multipliers, str) else type(multipliers).__name__
        raise ValueError(f"multipliers is the {kind} {multipliers!r}; give a list of names, such as ['mul8s_1L2J'].")
    found = [multiplier(name) for name in ([EXACT] if exact else []) + list(multipliers)]
    for m in found:
        if m.power_mw is None:
            raise ValueError(
                f"The power of multiplier {m.name!r} is not known, so that a choice of it has no price; leave it out,"
                " or choose among circuits with a power, such as axmoe_lite.EVOAPPROX."
            )
    return list(dict.fromkeys(m.name for m in found))


def _needed(groups: dict[str, list[str]], names: Sequence[str], candidates: int) -> int:
    """Networks to run before the first move, at most: single changes, candidates, uniform assignments."""
    return 1 + len(groups) * (len(names) - 1) + candidates + len(names) - 1


def check_groups(groups: dict[str, list[str]]) -> None:
    """Refuse groups that are empty or overlap."""
    if not groups or not all(groups.values()):
        empty = [name for name, layers in groups.items() if not layers]
        what = f"group {empty[0]!r} has no layers" if empty else "there are no groups"
        raise ValueError(f"Nothing can choose: {what}. groups(network) makes them, or give name: [layer, ...].")
    layers = [layer for part in groups.values() for layer in part]
    twice = [layer for layer in dict.fromkeys(layers) if layers.count(layer) > 1]
    if twice:
        raise ValueError(f"Layer {twice[0]!r} is in two groups, which may choose differently; name it once.")


def layers_of(groups: dict[str, list[str]], network: nn.Module) -> list[str]:
    """The layers of all groups, all of which the network has."""
    check_groups(groups)
    known = approximable(network)
    for group, layers in groups.items():
        for layer in layers:
            if layer not in known:
                raise ValueError(
                    f"Group {group!r} names layer {layer!r}; this {type(network).__name__} has {', '.join(known)}."
                )
    return [layer for layers in groups.values() for layer in layers]


def check_options(
    groups: dict[str, list[str]],
    names: list[str],
    *,
    candidates: int = 16,
    refine: int = 32,
    budget: int | None = None,
    objective: str = "divergence",
) -> None:
    """Refuse numbers that no search can be run with."""
    check_groups(groups)
    moe.check_option("objective", objective, OBJECTIVES)
    if candidates < 1 or refine < 0:
        raise ValueError(f"candidates is {candidates} and refine {refine}; at least 1 and at least 0 are needed.")
    needed = _needed(groups, names, candidates)
    if budget is not None and budget < needed:
        raise ValueError(
            f"budget is {budget}; {len(groups)} groups and {len(names)} multipliers need {needed} networks before the"
            " first move. Give more, or make larger groups, see groups(by=...)."
        )
