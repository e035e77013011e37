"""Adapters for serving engines, one package an engine: FarSkip checkpoints served by it, and the kernels under it."""
