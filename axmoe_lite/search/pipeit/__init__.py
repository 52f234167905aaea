"""Pipe-it: one stage of a network on each group of cores, and one image behind the other through them.

    shapes       Layer, the matrix product of a layer: N, K, M and groups
    follow       a network followed once while it runs: its graph, with sizes and layers
    trace        describe a network's layers by following it once; split it into stages
    workers      a real pipeline of pinned worker processes, and the same cores as data parallelism
    ways         the same cores used in several ways, in turn
    links        values from one process to the next, through memory that both see
    microbench   layers that nobody uses, measured on this machine's cores
    times        seconds of a layer on a number of cores, fitted to those
    schedule     find_split, work_flow, merge_stage, and the exact optimum they are held against
    board        a big.LITTLE board, simulated from published throughputs

Splitting one convolution over all cores of a big.LITTLE processor can be slower than its big cores alone, because
the clusters must keep their caches coherent. Pipe-it (Wang et al., 2020) keeps each layer in one cluster:

    layers = describe(network, x)                                       what each layer multiplies
    predictor = fit(measure(synthetic(400)))                            seconds, from measurements of this machine
    best = optimum(predictor.table(layers), {"host": 2})                stages, and which layers are in each
    stages = split(network, x, [0, 8, 22])                              modules that compute them
    ran = run(stages, images, cores=[[0], [1]])                         answers, images per second, who did what when

Chapter: 19, "Which core for which layer?"
"""

from axmoe_lite.search.pipeit import board
from axmoe_lite.search.pipeit.microbench import host, measure, synthetic
from axmoe_lite.search.pipeit.schedule import Schedule, evaluate, gantt, merge_stage, optimum, pipelines, points
from axmoe_lite.search.pipeit.shapes import Layer
from axmoe_lite.search.pipeit.times import Predictor, apart, fit
from axmoe_lite.search.pipeit.trace import chain, describe, seams, split
from axmoe_lite.search.pipeit.ways import race
from axmoe_lite.search.pipeit.workers import Ran, Span, parallel, run

__all__ = [
    "Layer",
    "Predictor",
    "Ran",
    "Schedule",
    "Span",
    "apart",
    "board",
    "chain",
    "describe",
    "evaluate",
    "fit",
    "gantt",
    "host",
    "measure",
    "merge_stage",
    "optimum",
    "parallel",
    "pipelines",
    "points",
    "race",
    "run",
    "seams",
    "split",
    "synthetic",
]
