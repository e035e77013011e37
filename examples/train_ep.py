"""Training with hidden expert-parallel communication: FSDP2 for dense parameters, ours for experts.

    torchrun --nproc-per-node 2 examples/train_ep.py run --steps 20            # on CPU, in Triton's interpreter
    torchrun --nproc-per-node 8 examples/train_ep.py run --device cuda --ep 4  # 2 replicas of the experts

Called again with the same folder it goes on from there, also with another --ep. Ranks that share a GPU need CUDA
MPS, and the other collectives are gloo's there, since NCCL refuses two ranks on one GPU.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_map_only

import farskip_fused as ff

VOCAB, HIDDEN, HEADS, LAYERS, EXPERTS, TOP_K, SEQUENCE = 64, 64, 4, 2, 4, 2, 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def project(self, hidden_states):
        return self.qkv(hidden_states).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)

    def attend(self, projected):
        attended = nn.functional.scaled_dot_product_attention(*projected[:, None], is_causal=True)
        return self.out(attended[0].transpose(0, 1).flatten(1))


class Model(nn.Module):
    def __init__(self, memory):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(VOCAB, HIDDEN), nn.ModuleList()
        for _ in range(LAYERS):
            moe = ff.FusedMoE(HIDDEN, 2 * HIDDEN, EXPERTS, TOP_K, ep=memory, max_tokens=SEQUENCE)
            norms = {name: nn.RMSNorm(HIDDEN) for name in ("attention_norm", "moe_norm")}
            self.layers.append(ff.OverlappedLayer(Attention(), moe, **norms))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens):
        carry = self.embedding(tokens)
        for layer in self.layers:
            carry = layer(carry)
        return self.head(self.norm(carry.full()))


def training_state(model, optimizer, mesh):
    """For torch.distributed.checkpoint; the tensors of three dimensions are the experts of this rank, shards of all."""
    shard = lambda each: DTensor.from_local(each, mesh, (Replicate(), Shard(0))) if each.dim() == 3 else each  # noqa: E731
    model_state, optimizer_state = tree_map_only(torch.Tensor, shard, get_state_dict(model, optimizer))
    return {"model": model_state, "optimizer": optimizer_state}


def train(folder: Path, device: str, ep: int, steps: int, save_every: int) -> list[float]:
    """Losses of the steps that were left to do, each the mean of all ranks."""
    world = dist.get_world_size()
    mesh = init_device_mesh(device, (world // ep, ep), mesh_dim_names=("replica", "ep"))
    memory = ff.init(mesh["ep"].get_group(), device=device)
    torch.manual_seed(0)
    model = Model(memory).to(device)
    experts = [weight for layer in model.layers for weight in (layer.moe.w13, layer.moe.w2)]
    torch.manual_seed(1 + mesh.get_local_rank("ep"))
    for weight in experts:
        nn.init.normal_(weight, std=0.05)  # not those of the other ranks
    everybody = init_device_mesh(device, (world,))
    for layer in model.layers:
        layer.moe.setup()
        fully_shard(layer.attention, mesh=everybody)
        for half in ("project", "attend"):
            register_fsdp_forward_method(layer.attention, half)
    fully_shard(model, mesh=everybody, ignored_params=set(experts))
    dense = {"params": [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]}
    optimizer = torch.optim.AdamW([dense, {"params": experts}], lr=3e-3)
    first, losses = 0, []
    if (folder / ".metadata").exists():
        state = training_state(model, optimizer, mesh) | {"step": 0}
        dcp.load(state, checkpoint_id=folder)
        first, own = state.pop("step"), tree_map_only(DTensor, lambda e: e.to_local() if e.dim() == 3 else e, state)
        set_state_dict(model, optimizer, model_state_dict=own["model"], optim_state_dict=own["optimizer"])
    for step in range(first, steps):
        torch.manual_seed(step * world + dist.get_rank())
        tokens = (torch.randint(VOCAB, (1,)) + torch.arange(SEQUENCE + 1)).to(device) % VOCAB  # they count up
        loss = nn.functional.cross_entropy(model(tokens[:-1]), tokens[1:])
        loss.backward()
        for weight in experts:  # so far a sum over the ranks of a replica; FSDP has averaged the others over all
            dist.all_reduce(weight.grad, group=mesh["replica"].get_group())
            weight.grad /= world
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach() / world)
        losses.append(loss.item())
        if (step + 1) % save_every == 0:
            dcp.save(training_state(model, optimizer, mesh) | {"step": step + 1}, checkpoint_id=folder)
    memory.close()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name, default in {"device": "cpu", "ep": 2, "steps": 20, "save-every": 10}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    if (arguments := parser.parse_args()).device == "cuda":  # DeviceMesh expects a GPU for every rank
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.device_count() > 1 else "gloo")
    print(*(f"{loss:.4f}\n" for loss in train(**vars(arguments)) if dist.get_rank() == 0), sep="", end="")
    dist.destroy_process_group()
