"""If losses added up: the front that sensitivities foretell, and how to look for a better one from there.

Each group of layers takes one multiplier; a choice costs the sum of its groups' costs and is taken to lose the sum of
their losses. The first is exact, the second is not: that is why what is foretold is then measured.

Letters: G groups, M multipliers, S choices.

Chapter: 12, "A multiplier for each expert?"
"""

import numpy as np


def front(cost: np.ndarray, loss: np.ndarray, *, bins: int = 4000) -> np.ndarray:
    """Every choice that none dominates, if costs and losses add up: a multiple-choice knapsack for all budgets at once.

    Groups are added one by one; of the sums so far, those that another dominates can never be part of a choice that
    is not. That alone is exact but can grow without limit, so in each of ``bins`` equal steps of cost the least loss is
    kept: exact until two that matter share a step.

    Args:
        cost, loss: [G, M]; a loss may be infinite.

    Returns:
        int64 [S, G], the multiplier of each group, from the cheapest to the dearest.

    >>> front(np.array([[0.0, 1.0], [0.0, 2.0]]), np.array([[5.0, 0.0], [1.0, 0.0]])).tolist()
    [[0, 0], [1, 0], [1, 1]]
    """
    step = (cost.max(1) - cost.min(1)).sum() / bins or 1.0
    sums, losses, chosen = np.zeros(1), np.zeros(1), np.zeros((1, 0), int)
    for g in range(len(cost)):
        before, options = np.divmod(np.arange(len(sums) * cost.shape[1]), cost.shape[1])
        sums = sums[before] + cost[g, options]
        losses = losses[before] + loss[g, options]
        keep = undominated(sums, losses)
        floor = np.floor((sums[keep] - sums[keep[0]]) / step)
        # Dearer means better on a front: of one step the last is the best, and the cheapest of all stays.
        keep = keep[(np.diff(floor, append=np.inf) > 0) | (np.arange(len(keep)) == 0)]
        sums, losses = sums[keep], losses[keep]
        chosen = np.concatenate([chosen[before[keep]], options[keep, None]], 1)
    return chosen


def undominated(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the points that none dominates, from the cheapest; of equal points the first.

    >>> undominated(np.array([2.0, 1.0, 1.0, 3.0]), np.array([0.1, 0.2, 0.3, 0.1])).tolist()
    [1, 0]
    """
    order = np.lexsort((loss, cost))
    least = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
    better = loss[order] < least
    better[0] = True  # the cheapest, though its loss be infinite
    return order[better]


def spread(cost: np.ndarray, n: int) -> np.ndarray:
    """Indices of at most n points at about even steps of cost, both ends among them.

    >>> spread(np.array([0.0, 0.1, 0.5, 1.0]), 3).tolist()
    [0, 2, 3]
    """
    targets = np.linspace(cost.min(), cost.max(), n)
    return np.unique(np.abs(cost[None, :] - targets[:, None]).argmin(1))


def promise(cost: np.ndarray, loss: np.ndarray, known_cost: np.ndarray, known_loss: np.ndarray) -> np.ndarray:
    """How much of the best known loss at its cost a point is expected to take away: log of the ratio, same shape.

    Losses below a thousandth of a nat count as alike.

    Args:
        cost, loss: of points not yet measured.
        known_cost, known_loss: [S], measured, of a front from the cheapest to the dearest.
    """
    finite = np.maximum(loss, 0) + 1e-3
    place = np.searchsorted(known_cost, cost + 1e-12, side="right") - 1
    level = np.where(place < 0, known_loss[0], known_loss[np.maximum(place, 0)])
    return np.log(np.minimum(level, 1e3) + 1e-3) - np.log(finite)
