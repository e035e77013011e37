"""What conversion would gain, before anyone spends a GPU-hour. Free of torch.

``predict(Job("deepseek-v3", "h100-ib400", ep=32))`` simulates the schedule of ``farskip_fused.schedule`` with durations
of kernels and links; ``sweep`` tries all splits of the same GPUs.
"""

from farskip_fused.plan.clusters import CLUSTERS, Cluster
from farskip_fused.plan.job import ELEMENTWISE, PHASES, PRECISIONS, TRANSPORTS, Job
from farskip_fused.plan.models import MODELS, Model
from farskip_fused.plan.prediction import Prediction, predict, recommendation
from farskip_fused.plan.splits import Sweep, sweep

__all__ = [
    "CLUSTERS",
    "ELEMENTWISE",
    "MODELS",
    "PHASES",
    "PRECISIONS",
    "TRANSPORTS",
    "Cluster",
    "Job",
    "Model",
    "Prediction",
    "Sweep",
    "predict",
    "recommendation",
    "sweep",
]
