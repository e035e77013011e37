"""vLLM's MoE layer with experts on several ranks of data parallelism computes what one rank computes.

Layers of vLLM's own making, without its engine: that wants a GPU for each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import farskip_fused as ff
from farskip_fused import expert_parallel, reference
from farskip_fused.connectivity import Connectivity, Streams, advance
from farskip_fused.launch import run_ranks
from farskip_fused.record import to_record
from tests.numerics import assert_close

HIDDEN, INTERMEDIATE, EXPERTS, REDUNDANT, TOP_K, MOST, SCALE = 48, 32, 8, 4, 3, 24, 1.5
WORLDS = [
    pytest.param("cpu", 2, marks=pytest.mark.rung2),
    pytest.param("cuda:0", 2, marks=pytest.mark.rung3),
    pytest.param("cuda:0", 4, marks=pytest.mark.rung3),
    pytest.param("cuda", 2, marks=pytest.mark.rung4),
]


class Shared(nn.Module):
    """In the place of shared experts."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * hidden_states


class Rank:
    """vLLM's configuration and layers on a rank of data and expert parallelism. placement: of experts."""

    def __init__(self, memory: ff.SymmetricMemory, placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.config import DeviceConfig, ParallelConfig, SchedulerConfig, VllmConfig
        from vllm.model_executor.layers.fused_moe import layer as fused_moe
        from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as unquantized
        from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

        import farskip_fused.engines.vllm
        from farskip_fused.engines.vllm import expert_parallel, layers, ranks
        from farskip_fused.engines.vllm.experts import FarSkipExperts

        farskip_fused.engines.vllm.register()
        self.memory, self.placement = memory, placement
        self.factory = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
        parallel = FusedMoEParallelConfig(
            tp_size=1, tp_rank=0, pcp_size=1, pcp_rank=0, dp_size=memory.world, dp_rank=memory.rank,
            ep_size=memory.world, ep_rank=memory.rank, sp_size=1, use_ep=True,
            all2all_backend="allgather_reducescatter", enable_eplb=placement == "redundant",
        )  # fmt: skip
        # vLLM's groups would be NCCL's, which takes one rank a GPU.
        monkeypatch.setattr(ranks, "_memory", memory)
        monkeypatch.setattr(expert_parallel, "get_ep_group", lambda: None)
        monkeypatch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: 1)
        monkeypatch.setattr(fused_moe, "make_parallel_config", lambda **_: parallel)
        if memory.device.type == "cpu":  # for which vLLM has no experts on several ranks
            chosen = unquantized.UnquantizedMoeBackend.TRITON, FarSkipExperts
            monkeypatch.setattr(unquantized, "select_unquantized_moe_backend", lambda **_: chosen)
        self.config = VllmConfig(
            device_config=DeviceConfig(device=memory.device.type),
            parallel_config=ParallelConfig(
                data_parallel_size=memory.world, data_parallel_rank=memory.rank, enable_expert_parallel=True
            ),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=MOST, max_model_len=MOST, max_num_seqs=MOST, is_encoder_decoder=False
            ),
            additional_config={"farskip_experts": True, "farskip_all_to_all": True},
        )

    def layer(self, name: str, shared: nn.Module | None) -> Any:
        """A runner of vLLM's; its weights are for ``load``."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

        redundant = self.placement == "redundant"
        with set_current_vllm_config(self.config), self.memory.device:
            runner = self.factory(
                num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
                params_dtype=torch.float32, renormalize=True, prefix=name, shared_experts=shared,
                enable_eplb=redundant, num_redundant_experts=REDUNDANT * redundant, routed_scaling_factor=SCALE,
                apply_routed_scale_to_output=True,
            )  # fmt: skip
        # Where vLLM's layer ends it would sum over the one rank of tensor parallelism.
        runner.moe_config.skip_final_all_reduce = True
        if self.placement == "round_robin":  # which vLLM keeps to other ways of moving tokens, so far
            world, rank = self.memory.world, self.memory.rank
            found = determine_expert_map(world, rank, EXPERTS, "round_robin")
            runner.routed_experts.expert_map_manager._expert_map = found[1]
        return runner

    def load(self, runner: Any, w13: Tensor, w2: Tensor) -> None:
        experts = runner.routed_experts
        held = (experts.expert_map_manager.expert_map.cpu() >= 0).nonzero()[:, 0] % EXPERTS
        experts.w13_weight.data.copy_(w13[held]), experts.w2_weight.data.copy_(w2[held])
        experts.quant_method.process_weights_after_loading(experts)

    @contextmanager
    def forward_pass(self, tokens: Tensor) -> Iterator[None]:
        """With so many tokens at each rank."""
        from vllm.forward_context import set_forward_context

        mine = int(tokens[self.memory.rank])
        with (
            torch.inference_mode(),
            set_forward_context(None, self.config, num_tokens=mine, num_tokens_across_dp=tokens.int()),
        ):
            yield


def random_weights() -> tuple[Tensor, Tensor]:
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5
    return w13, torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5


def route(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(dim=-1).topk(TOP_K, dim=-1)
    return ids, weights / weights.sum(dim=-1, keepdim=True)


def routed(hidden_states: Tensor, logits: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """In float64, on one rank."""
    ids, weights = route(logits.double())
    return SCALE * reference.experts(hidden_states.double(), ids, weights, w13.double(), w2.double())


def compare_layers(memory: ff.SymmetricMemory) -> None:
    """This rank's tokens get what one rank computes for them, with each placement of experts."""
    for placement in ("linear", "round_robin", "redundant"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            rank = Rank(memory, placement, monkeypatch)
            compare_layer(rank, rank.layer("moe", Shared()))
    memory.synchronize()


def compare_layer(rank: Rank, runner: Any) -> None:
    memory = rank.memory
    torch.manual_seed(0)
    w13, w2 = random_weights()
    rank.load(runner, w13, w2)
    passes = [torch.randint(0, MOST + 1, (memory.world,)) for _ in range(3)]
    passes += [torch.zeros(memory.world).int(), torch.arange(memory.world).clamp(max=1) * MOST]
    torch.manual_seed(10 + memory.rank)
    for across in passes:
        tokens = int(across[memory.rank])
        hidden, logits = torch.randn(tokens, HIDDEN), torch.randn(tokens, EXPERTS)
        here = hidden.to(memory.device), logits.to(memory.device)
        expected = routed(hidden, logits, w13, w2)
        with rank.forward_pass(across):
            # On CPU vLLM's router leaves logical ids as they are; without tokens it is not asked at all.
            if rank.placement == "redundant" or tokens == 0:
                ids, weights = route(logits)
                copies = ids + EXPERTS * torch.randint(0, 2, ids.shape)
                copies = torch.where(copies < runner.routed_experts.global_num_experts, copies, ids)
                choice = weights.to(memory.device), copies.to(memory.device)
                found = SCALE * runner.routed_experts.forward_modular(here[0], *choice)
            else:
                found, expected = runner(*here), 2 * hidden.double() + expected
        assert_close(found.cpu(), expected, torch.float32)


@pytest.mark.parametrize(("device", "world"), WORLDS)
def test_ranks_with_unequal_tokens_get_what_one_rank_computes(device: str, world: int) -> None:
    run_ranks(compare_layers, world, device=device)


class Norm(nn.Module):
    """As vLLM's: of a tensor, or of a sum, which it returns too. Here it only divides."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return hidden_states / 2
        return (hidden_states + residual) / 2, hidden_states + residual


class Block(nn.Module):
    def __init__(self, runner: Any, gate: Tensor) -> None:
        super().__init__()
        self.experts, self.gate = runner, gate

    def router(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states @ self.gate.to(hidden_states), None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.experts(hidden_states, self.router(hidden_states)[0])


class Layer(nn.Module):
    def __init__(self, block: Block, steps: list[str]) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm, self.mlp = Norm(), Norm(), block
        self.steps = steps

    def self_attn(self, positions: None, hidden_states: Tensor) -> Tensor:
        self.steps.append("attention")
        return hidden_states.flip(-1)


def run_stacks(memory: ff.SymmetricMemory) -> list[list[str]]:
    return [run_stack(memory, has_shared) for has_shared in (True, False)]


def run_stack(memory: ff.SymmetricMemory, has_shared: bool) -> list[str]:
    """What FarSkip layers do, in order, whose result is checked."""
    from farskip_fused.engines.vllm.layers import wire

    steps: list[str] = []
    connectivity = Connectivity.named("farskip")
    torch.manual_seed(0)
    gates = torch.randn(3, HIDDEN, EXPERTS)
    weights = [random_weights() for _ in gates]
    across = torch.arange(1, memory.world + 1) * 5
    with pytest.MonkeyPatch.context() as monkeypatch:
        rank = Rank(memory, "linear", monkeypatch)
        runners = [rank.layer(f"layers.{i}", Shared() if has_shared else None) for i in range(len(gates))]
        layers = [Layer(Block(runner, gate), steps) for runner, gate in zip(runners, gates, strict=True)]
        record = to_record(connectivity, range(len(layers)))
        model = SimpleNamespace(hf_config=SimpleNamespace(farskip=record))
        wire(SimpleNamespace(layers=layers), SimpleNamespace(model_config=model, speculative_config=None))  # type: ignore[arg-type]
        for runner, of_experts in zip(runners, weights, strict=True):
            rank.load(runner, *of_experts)
        for step in ("experts", "finish"):
            method = getattr(expert_parallel.Pending, step)

            def noted(*args: Any, step: str = step, method: Any = method, **kwargs: Any) -> Any:
                steps.append(step)
                return method(*args, **kwargs)

            monkeypatch.setattr(expert_parallel.Pending, step, noted)
        torch.manual_seed(10 + memory.rank)
        embedding = torch.randn(int(across[memory.rank]), HIDDEN)

        hidden_states, residual = embedding.to(memory.device), None
        with rank.forward_pass(across):
            for layer in layers:
                hidden_states, residual = layer(None, hidden_states, residual)
            found = hidden_states + residual
    streams = Streams.before_layers(embedding.double())
    for gate, of_experts in zip(gates, weights, strict=True):
        streams = advance(
            streams,
            connectivity,
            lambda stream: (stream / 2).flip(-1),
            lambda stream, gate=gate, of_experts=of_experts: (
                stream if has_shared else None,
                routed(stream / 2, stream / 2 @ gate.double(), *of_experts),
            ),
        )
    assert_close(found.cpu(), streams.full, torch.float32)
    memory.synchronize()
    return steps


@pytest.mark.parametrize(("device", "world"), WORLDS)
def test_outputs_come_back_while_the_next_attention_runs(device: str, world: int) -> None:
    last = ["attention", "finish", "finish", "experts"]  # by finish() itself
    expected = ["attention", "experts", "attention", "finish", "experts", *last]
    assert run_ranks(run_stacks, world, device=device) == [[expected, expected]] * world
