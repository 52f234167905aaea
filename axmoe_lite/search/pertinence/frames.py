"""In a sequence of frames the answer to "which network?" may be kept for a while.

    film = sequence(images)                                     frames, labels, scenes
    pool = look(networks, replace(images, x_test=film.frames, y_test=film.labels))
    again = when(film.frames, threshold=0.016)                  at which frames the dispatcher is asked
    follow(pool, choose(layers, pool.features)[0], again)       accuracy and cost of a frame

Between two askings the chosen network runs alone: neither features nor layer are paid for, but the choice grows old.

Letters: L frames, C channels, H x W pixels, N networks.

Source: PERTINENCE (arXiv 2507.01695, v3) for both rules and the score's weights and threshold.

Chapter: 18, "Which network for which input?"
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from axmoe_lite.datasets import Images
from axmoe_lite.search.pertinence.pool import Pool

THRESHOLD = 0.016
BINS = 32
PIXELS, HISTOGRAM = 0.2, 0.8  # what the two differences count


@dataclass(frozen=True, eq=False)
class Film:
    """Frames to be played in turn: uint8 [L, C, H, W], their labels int64 [L] and their scenes int64 [L]."""

    frames: Tensor
    labels: Tensor
    scene: Tensor


def sequence(
    images: Images,
    *,
    scenes: int = 40,
    frames: int = 25,
    step: float = 0.3,
    light: float = 0.002,
    which: Tensor | None = None,
    seed: int = 0,
) -> Film:
    """A film made of test images, because none is at hand: in each scene one image drifts about, then a cut.

    This is no video. Nothing moves before a background, nothing turns, and all frames of a scene have one label: it
    shows how the rules of :func:`when` work and what they cost, not what they gain on a camera. Not from the paper.

    Args:
        images: whose test images are taken, each for at most one scene.
        scenes: how many; they are equally long.
        frames: of each scene.
        step: standard deviation of the drift from one frame to the next, pixels in both directions. Positions are
            rounded to whole pixels and stay within a quarter of the image; what comes in from outside is a reflection.
        light: standard deviation of the change of brightness from one frame to the next, as a share; it stays within a
            fifth of the original.
        which: indices of test images to draw from, such as ``split.final``; None: all.
        seed: of images and drift.

    Raises:
        ValueError: for no scenes or frames, a negative step, more scenes than images, or images below 4 pixels.

    >>> from axmoe_lite import datasets
    >>> film = sequence(datasets.synthetic(classes=3, size=8, n_train=4, n_test=9), scenes=3, frames=4)
    >>> film.frames.shape, film.scene.tolist()
    (torch.Size([12, 3, 8, 8]), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    """
    known = torch.arange(len(images.x_test)) if which is None else torch.as_tensor(which)
    height, width = images.x_test.shape[2:]
    if scenes < 1 or frames < 1 or not step >= 0 or not light >= 0:
        raise ValueError(
            f"scenes is {scenes}, frames {frames}, step {step}, light {light}; at least 1, 1, 0 and 0 are needed."
        )
    if scenes > len(known) or min(height, width) < 4:
        raise ValueError(
            f"{scenes} scenes of {len(known)} images of {height} x {width} pixels; a scene takes an image of its"
            " own, of at least 4 x 4."
        )
    draw = torch.Generator().manual_seed(seed)
    chosen = known[torch.randperm(len(known), generator=draw)[:scenes]]
    start = torch.zeros(scenes, 1, 3)
    moves = torch.randn(scenes, frames - 1, 3, generator=draw) * torch.tensor([step, step, light])
    walk = torch.cat([start, moves], 1).cumsum(1)
    margin = torch.tensor([height // 4, width // 4])
    place = margin + walk[..., :2].round().long().clamp(-margin, margin)
    bright = 1 + walk[..., 2].clamp(-0.2, 0.2)
    x = images.x_test[chosen.to(images.x_test.device)].cpu().float()
    padded = torch.nn.functional.pad(x, [int(margin[1])] * 2 + [int(margin[0])] * 2, mode="reflect")
    rows = place[..., 0, None] + torch.arange(height)  # [scenes, frames, H]
    columns = place[..., 1, None] + torch.arange(width)
    scene = torch.arange(scenes)[:, None, None, None]
    moved = padded.permute(0, 2, 3, 1)[scene, rows[..., :, None], columns[..., None, :]]  # [scenes, frames, H, W, C]
    lit = (moved * bright[..., None, None, None]).round().clamp(0, 255).to(torch.uint8)
    return Film(
        frames=lit.flatten(0, 1).permute(0, 3, 1, 2).contiguous(),
        labels=images.y_test.cpu()[chosen].repeat_interleave(frames),
        scene=torch.arange(scenes).repeat_interleave(frames),
    )


def scene_change(a: Tensor, b: Tensor) -> Tensor:
    """How different two frames are, in [0, 1]: 0.2 times that of pixels, 0.8 times that of histograms; [L].

    The difference of pixels is the mean absolute one over 255. That of histograms is the share of pixels that would
    have to change their bin: half the sum of absolute differences between the shares of 32 equal bins of grey, the mean
    of the channels. (The paper gives the two weights; the definitions are not from it.)

    Args:
        a, b: uint8 [L, C, H, W], or [C, H, W] for one pair, which gives a number without a dimension.

    >>> black, white = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)
    >>> scene_change(black, white).item(), scene_change(black, black).item()
    (1.0, 0.0)
    """
    if a.shape != b.shape or a.ndim not in (3, 4) or a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(
            f"scene_change() was given {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}; frames are uint8"
            " [L, C, H, W] or [C, H, W], both alike."
        )
    if a.ndim == 3:
        return scene_change(a[None], b[None])[0]
    pixels = (a.double() - b.double()).abs().flatten(1).mean(1) / 255
    return PIXELS * pixels + HISTOGRAM * (_histogram(a) - _histogram(b)).abs().sum(1) / 2


def when(frames: Tensor, *, every: int | None = None, threshold: float | None = None) -> Tensor:
    """At which frames the dispatcher is asked: bool [L]. The first is always among them.

    Args:
        frames: uint8 [L, C, H, W].
        every: D, at every D-th frame.
        threshold: where :func:`scene_change` from the frame before is above this. The paper: 0.016. A slow drift stays
            below it for ever; with ``every`` as well, either is a reason.

    Raises:
        ValueError: for neither, ``every`` below 1, or a threshold that is negative.

    >>> when(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), every=2).tolist()
    [True, False, True, False, True]
    """
    if (every is None and threshold is None) or (every is not None and every < 1):
        raise ValueError(
            f"every is {every}, threshold {threshold}; give a number of frames (at least 1), or a threshold."
        )
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; it is a score from 0 to 1, in the paper {THRESHOLD}.")
    again = torch.zeros(len(frames), dtype=torch.bool)
    again[:: every or len(frames)] = True
    if threshold is not None:
        again[1:] |= (scene_change(frames[:-1], frames[1:]) > threshold).cpu()
    return again


@dataclass(frozen=True, eq=False)
class Followed:
    """What a film cost, and how well it was answered.

    Attributes:
        accuracy: the share of frames answered rightly, in [0, 1].
        cost: the mean for a frame, in the pool's unit.
        asked: the share of frames at which the dispatcher ran.
        chosen: int64 [L], the network that answered each frame.
        right: bool [L], whether its answer was right.
    """

    accuracy: float
    cost: float
    asked: float
    chosen: Tensor
    right: Tensor


def follow(pool: Pool, choices: Tensor, again: Tensor) -> Followed:
    """Play a film: the dispatcher is asked at some frames, and its choice answers until it is asked again.

    A frame at which it is asked costs :attr:`Pool.paid`, extractor and layer included; every other frame costs the
    chosen network alone. The scene-change score is not counted: it has no products of weights.

    Args:
        pool: what all networks answered to the frames, in their order.
        choices: int64 [L], what the dispatcher would choose at each frame.
        again: bool [L], of :func:`when`; the first is True.

    Raises:
        ValueError: for other lengths, or a film that begins without a choice.

    >>> pool = Pool("ab", [1, 3], [[1, 1], [0, 1], [0, 1], [1, 0]], torch.zeros(4, 1), None, 0.5, product=0)
    >>> played = follow(pool, torch.tensor([0, 1, 1, 0]), torch.tensor([True, False, True, False]))
    >>> played.chosen.tolist(), played.accuracy, played.cost  # 1.5, 1, 3.5 and 3
    ([0, 0, 1, 1], 0.5, 2.25)
    """
    L = len(pool)
    if choices.shape != (L,) or again.shape != (L,) or again.dtype != torch.bool or not again[0]:
        raise ValueError(
            f"choices are {list(choices.shape)}, again {again.dtype} {list(again.shape)}; for {L} frames give [{L}] and"
            f" bool [{L}], which begins with True."
        )
    last = torch.where(again, torch.arange(L), 0).cummax(0).values
    chosen = choices[last]
    paid = torch.where(again, pool.paid[chosen], pool.cost[chosen])
    right = pool.correct[torch.arange(L), chosen]
    return Followed(
        accuracy=right.double().mean().item(),
        cost=paid.mean().item(),
        asked=again.double().mean().item(),
        chosen=chosen,
        right=right,
    )


def rules(
    pool: Pool,
    choices: Tensor,
    frames: Tensor,
    *,
    every: Iterable[int] = (1, 2, 4, 8, 16),
    thresholds: Iterable[float] = (THRESHOLD, 0.03, 0.06, 0.12),
) -> list[dict]:
    """:func:`follow` under several settings of :func:`when`.

    Returns:
        A dict each: ``rule``, ``setting``, and ``accuracy``, ``cost`` and ``asked`` of :class:`Followed`.
    """
    asked = [("every D frames", D, {"every": D}) for D in every]
    asked += [("scene change above", at, {"threshold": at}) for at in thresholds]
    rows = []
    for rule, setting, how in asked:
        one = follow(pool, choices, when(frames, **how))
        figures = {"accuracy": one.accuracy, "cost": one.cost, "asked": one.asked}
        rows.append({"rule": rule, "setting": setting, **figures})
    return rows


def _histogram(frames: Tensor) -> Tensor:
    """Shares of grey levels in equal bins: [L, C, H, W] to [L, BINS]."""
    grey = frames.double().mean(1).flatten(1)
    bins = (grey * BINS / 256).long() + BINS * torch.arange(len(frames), device=frames.device)[:, None]
    counts = torch.bincount(bins.flatten(), minlength=BINS * len(frames))
    return counts.view(len(frames), BINS).double() / grey.shape[1]
