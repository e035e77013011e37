"""Triton kernels of farskip-fused, one family a file; imports torch, triton and, to launch, ``farskip_fused._C``.

machine.py                  compiled on a GPU, interpreted without one
protocol.py                 the context of a symmetric buffer, bounded waits, announcements
gate.py, routing.py         gate logits; softmax and sigmoid top-k, bias-corrected and group-limited; their backward
layout.py                   which row goes where: send positions, the expert-sorted index, the row tiles
tiles.py                    block sizes of the expert GEMMs
experts.py                  expert GEMMs with SwiGLU, forward: plain Triton, or Hopper's
experts_backward.py         their gradients
hopper.py                   what the GEMMs for Hopper share: loader, consumers, ring; in Gluon
hopper_forward.py, hopper_down_gradient.py, hopper_weight_gradient.py   those GEMMs
gather_sum.py               between tokens and sorted rows: sums over top-k, gathered copies
dispatch.py                 rows from the token's rank to the ranks of its experts
experts_to_owner.py         the projection that stores rows at their token's rank
all_reduce.py               the rows of all ranks summed at every rank, in one shot or two
combine.py                  expert outputs at the token's rank: the weighted sum over top-k
"""

if __name__ == "kernels":
    # Started in the repository's root, Python finds this folder under the name of an unrelated package that
    # transformers probes for. Hand over to that package if it is installed; otherwise transformers sees a package
    # without a version and calls it absent. Raising here would break ``import transformers``.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _elsewhere = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parents[1]]
    _installed = PathFinder.find_spec("kernels", _elsewhere)
    if _installed is not None and _installed.loader is not None:
        sys.modules["kernels"] = module_from_spec(_installed)
        _installed.loader.exec_module(sys.modules["kernels"])
