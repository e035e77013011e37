"""From a checkpoint to vLLM and one request: convert without touching the weights, load, ask.

    pip install 'farskip-fused[vllm]'
    python examples/serve.py distilled --prompt "def read_lines(path):"
    python examples/serve.py qwen3-30b-a3b --convert-to converted --layers last:50% --prompt "Hello"

The first takes what ``farskip distill`` or examples/distill_checkpoint.py has saved; a stock checkpoint that is only
converted answers worse. A server of the same checkpoint: ``vllm serve distilled``.
"""

import argparse
from pathlib import Path

from farskip_fused.conversion import convert_checkpoint


def answer(checkpoint: Path, prompt: str, max_tokens: int, **engine_options) -> str:
    """Greedy continuation of the prompt. engine_options: of ``vllm.LLM``."""
    from vllm import LLM, SamplingParams  # FarSkip's models come with it: the package is a plugin of vLLM's

    engine = LLM(str(checkpoint), **engine_options)
    (output,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
    return output.outputs[0].text


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path, help="with its tokenizer; FarSkip or, with --convert-to, stock")
    parser.add_argument("--convert-to", type=Path, help="folder for the converted checkpoint; must not exist")
    parser.add_argument("--layers", default="all", help='to convert, such as "last:50%%"')
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint
    if arguments.convert_to is not None:
        convert_checkpoint(checkpoint, arguments.convert_to, layers=arguments.layers)
        checkpoint = arguments.convert_to
    print(answer(checkpoint, arguments.prompt, arguments.max_tokens))
