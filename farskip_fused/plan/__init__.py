"""What conversion would gain: durations of a layer's actions, the schedule simulated with them, and its figure."""

from farskip_fused.plan.durations import CLUSTERS, SHAPES, Cluster, Durations, LayerShape, estimate
from farskip_fused.plan.figure import draw
from farskip_fused.plan.prediction import predict, sentence
from farskip_fused.plan.timeline import Interval, Timeline, simulate

__all__ = [
    "CLUSTERS",
    "SHAPES",
    "Cluster",
    "Durations",
    "Interval",
    "LayerShape",
    "Timeline",
    "draw",
    "estimate",
    "predict",
    "sentence",
    "simulate",
]
