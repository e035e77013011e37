"""The distillation script takes damage away and saves a model that loads with the same logits, as it checks itself."""

import importlib.util
from dataclasses import replace
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "distill_checkpoint.py"


def test_a_tiny_model_is_distilled_saved_and_loaded(tmp_path):
    spec = importlib.util.spec_from_file_location("distill_checkpoint", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before, after = script.distill(
        *script.make_checkpoint(tmp_path), tmp_path / "distilled", replace(script.TINY, steps=5)
    )
    assert 0.0 < after < before
    assert (tmp_path / "distilled" / "tokenizer.json").exists()
