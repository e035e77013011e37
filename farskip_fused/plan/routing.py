"""Where tokens go: how uneven the ranks' loads are and how many ranks and nodes a token reaches, by sampling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SAMPLED_TOKENS = 4096
DRAWS = 16  # layers that are drawn, each with its own tokens


@dataclass(frozen=True)
class Routing:
    """Of one layer. busiest: rows of the busiest rank over the mean. Means over tokens, all for one rank's tokens:

    remote_ranks, remote_nodes: other ranks, and other nodes, that a token's row goes to.
    near_ranks: other ranks of its own node. remote_rows, near_rows: the same counted once for each expert.
    forwarded: ranks that a row goes on to inside the other nodes.
    """

    busiest: float
    remote_ranks: float
    remote_nodes: float
    near_ranks: float
    remote_rows: float
    near_rows: float
    forwarded: float


@lru_cache(maxsize=256)
def _choices(experts: int, top_k: int, groups: int, groups_of_token: int, skew: float) -> np.ndarray:
    """Experts of sampled tokens, [SAMPLED_TOKENS, top_k]: without replacement, by a Zipf law of exponent ``skew``.

    A limit to groups is applied as DeepSeek-V3's router does: groups ranked by their two best experts.
    """
    random = np.random.default_rng(0)
    popularity = -skew * np.log(np.arange(1, experts + 1))
    scores = random.permutation(popularity) + random.gumbel(size=(SAMPLED_TOKENS, experts))
    if groups_of_token < groups:
        grouped = scores.reshape(SAMPLED_TOKENS, groups, -1)
        best_two = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        dropped = np.argsort(best_two, axis=-1)[:, : groups - groups_of_token]
        np.put_along_axis(grouped, dropped[..., None], -np.inf, axis=1)
        scores = grouped.reshape(SAMPLED_TOKENS, experts)
    return np.argpartition(-scores, top_k - 1, axis=-1)[:, :top_k]


@lru_cache(maxsize=1024)
def sample(
    experts: int, top_k: int, groups: int, groups_of_token: int, skew: float, ranks: int, node: int, tokens: int
) -> Routing:
    """Routing over ``ranks`` ranks, ``node`` of them in a node, each with ``tokens`` tokens of its own."""
    choices = _choices(experts, top_k, groups, groups_of_token, skew)
    owner = choices // (experts // ranks)
    sources = np.arange(SAMPLED_TOKENS) % ranks
    nodes = -(-ranks // node)
    reached = np.zeros((SAMPLED_TOKENS, nodes * node), dtype=bool)
    np.put_along_axis(reached, owner, True, axis=1)
    by_node = reached.reshape(SAMPLED_TOKENS, nodes, node)
    own_node = by_node[np.arange(SAMPLED_TOKENS), sources // node].sum(-1)
    own_rank = reached[np.arange(SAMPLED_TOKENS), sources]
    other_nodes = by_node.any(-1).sum(-1) - (own_node > 0)
    remote_rows = (owner != sources[:, None]).mean(0).sum()
    near_rows = ((owner // node == (sources // node)[:, None]) & (owner != sources[:, None])).mean(0).sum()
    return Routing(
        busiest=_busiest(choices, experts, ranks, tokens, skew > 0),
        remote_ranks=float((reached.sum(-1) - own_rank).mean()),
        remote_nodes=float(other_nodes.mean()),
        near_ranks=float((own_node - own_rank).mean()),
        remote_rows=float(remote_rows - near_rows),
        near_rows=float(near_rows),
        forwarded=float((reached.sum(-1) - own_node).mean()),
    )


def _busiest(choices: np.ndarray, experts: int, ranks: int, tokens: int, skewed: bool) -> float:
    """Mean over layers of the busiest rank's rows over the mean: experts as popular as sampled, rows drawn anew."""
    if ranks == 1:
        return 1.0
    total = tokens * ranks
    share = np.full(experts, choices.shape[1] / experts)
    if skewed:
        share = np.bincount(choices.ravel(), minlength=experts) / SAMPLED_TOKENS
    random = np.random.default_rng(1)
    rows = random.binomial(total, np.minimum(share, 1.0), size=(DRAWS, experts))
    loads = rows.reshape(DRAWS, ranks, -1).sum(-1)
    return float(np.mean(loads.max(-1) / np.maximum(loads.mean(-1), 1e-9)))
