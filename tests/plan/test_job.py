"""What a job refuses, with the numbers, and what memory it counts."""

import pytest

from farskip_fused.errors import UsageError
from farskip_fused.plan import CLUSTERS, PHASES, Job
from farskip_fused.plan.clusters import find_cluster

LITE = "deepseek-v2-lite"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "gpt-9"}, "Unknown model 'gpt-9'; use deepseek-v2-lite"),
        ({"cluster": "abacus"}, "Unknown cluster 'abacus'; use h100-ib400, .*a100-ib200"),
        ({"phase": "sleep"}, "Unknown phase 'sleep'; use training, prefill, decode"),
        ({"precision": "int3"}, "Unknown precision 'int3'; use bf16, fp8"),
        ({"transport": "pigeon"}, "Unknown transport 'pigeon'; use streams, all-to-all, fused"),
        ({"elementwise": "compiled"}, "Unknown elementwise 'compiled'; use separate, fused"),
        ({"connectivity": "none"}, "Unknown connectivity 'none'; use farskip"),
        ({"ep": 7}, "64 experts of deepseek-v2-lite do not divide over EP 7"),
        ({"tp": 3, "dp": 8}, "16 attention heads of deepseek-v2-lite do not divide over TP 3"),
        ({"model": "llama-4-scout", "tp": 5, "dp": 8}, "8 key-value heads of llama-4-scout do not divide over TP 5"),
        ({"ep": 8, "dp": 3}, "EP 8 does not divide the 3 GPUs of TP 1 x DP 3"),
        ({"batch": 0}, "batch is 0; a whole number from 1 is needed"),
        ({"dp": 0}, "dp is 0; a whole number from 1 is needed"),
        ({"skew": -1.0}, "skew is -1.0"),
        ({"depth": 4}, "depth is 4; 1 to 3 can be planned"),
        ({"depth": 2, "connectivity": "moe_only"}, "depth 2 is for connectivity farskip"),
        ({"layers": 28}, "28 layers were asked for; deepseek-v2-lite has 27"),
        ({"layers": 1}, "The first 1 layers of deepseek-v2-lite are dense"),
        ({"phase": "prefill", "tp": 8, "dp": 1, "connectivity": "moe_only"}, "no order for moe_only; use farskip or"),
        (
            {"model": "deepseek-v3", "ep": 8},
            r"deepseek-v3 does not fit: a GPU of h100-ib400 has 72 GB to use of 80.*weights",
        ),
        ({"model": "deepseek-v3", "phase": "decode", "ep": 32, "batch": 4096}, "does not fit.*cache"),
    ],
)
def test_impossible_jobs_are_refused_with_the_numbers(wrong, message):
    with pytest.raises(UsageError, match=message):
        Job(**({"model": LITE} | wrong))


def test_replicas_cover_expert_parallelism_by_default():
    assert (Job(LITE, ep=16).gpus, Job(LITE, ep=16, tp=4).dp, Job(LITE, "mi325x-400", ep=1, phase="decode").gpus) == (
        16,
        4,
        1,
    )


def test_training_runs_elementwise_operations_one_by_one_and_inference_fused():
    assert [Job(LITE, phase=phase).elementwise for phase in PHASES] == ["separate", "fused", "fused"]


def test_weights_of_a_job_without_parallelism_are_the_model():
    job = Job(LITE, "mi325x-400", ep=1, phase="prefill")
    assert sum(job.weights_per_gpu()) == job.sizes.total()
    assert job.memory()["weights"] == pytest.approx(31.4, rel=0.01)


def test_a_step_recomputes_only_if_its_activations_do_not_fit():
    assert not Job(LITE, "mi300x-400", ep=8, batch=8).recomputes
    assert Job(LITE, "h100-ib400", ep=8, batch=8).recomputes


def test_cutting_a_model_keeps_its_dense_layers():
    job = Job("deepseek-v3", "mi300x-400", ep=8, layers=6)
    assert (job.sizes.layers, job.sizes.moe_layers) == (6, 3)


def test_a_cluster_from_yaml(tmp_path):
    path = tmp_path / "ours.yaml"
    path.write_text("like: h100-ib400\nnetwork: 20\nnode: 4\n")
    cluster = find_cluster(path)
    assert (cluster.name, cluster.network, cluster.node) == ("ours", 20, 4)
    assert cluster.matmul == CLUSTERS["h100-ib400"].matmul


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("like: abacus", "like 'abacus' is unknown; use h100-ib400"),
        ("like: h100-ib400\nwarp: 9", "unknown warp; a cluster has name, matmul"),
        ("matmul: 100", "no capacity, collective_share, link, matmul_fp8, memory, network, reduce; a cluster has"),
        ("like: h100-ib400\nlink: fast", "link is 'fast'; a number from"),
        ("like: h100-ib400\nprocessors: 0.5", "processors is 0.5; a number from 1 to"),
        ("like: h100-ib400\nlate: 2", "late is 2; a number from 0 to 1"),
        ("like: h100-ib400\nlink: -1", "link is -1; a number from"),
        ("like: h100-ib400\ncollective_share: 1.5", "collective_share is 1.5; a number from 0 to 0.9"),
        ("- 1", "holds no mapping of rates"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path, content, message):
    path = tmp_path / "ours.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        find_cluster(path)
