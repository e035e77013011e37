"""A checkpoint converted, distilled, saved and loaded again; without one, a tiny model made on the spot.

    python examples/distill_checkpoint.py out            # under a minute on a CPU
    python examples/distill_checkpoint.py out --model qwen3-30b-a3b --data text/ --validation held-out.txt

The data are text files, or JSONL or Parquet of chats; docs/distillation.md says what else there is to choose.
"""

import argparse
import asyncio
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import farskip_fused as ff
from farskip_fused.distillation import DistillationConfig, evaluate, read_documents, token_blocks, train_tokenizer

# For a model this small; the defaults of DistillationConfig are for billions of parameters.
TINY = DistillationConfig(steps=40, batch_tokens=512, micro_batch_tokens=512, block_length=64, learning_rate=3e-3)


def make_checkpoint(folder: Path) -> tuple[Path, Path, Path]:
    """A random model with its tokenizer, and text: most of the source of asyncio, and one file held out."""
    *documents, held_out = read_documents(Path(asyncio.__file__).parent, "*.py")
    tokenizer = train_tokenizer(documents, vocab_size=320)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, moe_intermediate_size=32, head_dim=16,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
            max_position_embeddings=256, initializer_range=0.2,
            bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    checkpoint, training, validation = folder / "stock", folder / "training.txt", folder / "validation.txt"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    training.write_text("\n".join(document.text for document in documents), encoding="utf-8")
    validation.write_text(held_out.text, encoding="utf-8")
    return checkpoint, training, validation


def distill(
    source: Path, data: Path, validation: Path, target: Path, config: DistillationConfig, layers: str = "all"
) -> tuple[float, float]:
    """KL(teacher || student), nats a token of the validation text, after conversion and after FCSD."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    teacher = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, device_map=device).eval()
    model = ff.convert(copy.deepcopy(teacher), "farskip", layers)
    held_out = token_blocks(read_documents(validation), tokenizer, config.block_length)[:64]
    before = evaluate(model, held_out, teacher)
    report = ff.distill(model, data, config, teacher=teacher, tokenizer=tokenizer, validation=held_out)
    _, after = report.evaluations[-1]
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    loaded = ff.load(target, device_map=device).eval()
    with torch.no_grad():
        ids = held_out[:2].to(device)
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    return before.kl, after.kl


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path, help="folder for the distilled checkpoint; must not exist")
    parser.add_argument("--model", type=Path, help="a stock checkpoint with its tokenizer")
    parser.add_argument("--data", type=Path, help="a text, JSONL or Parquet file, or a folder of them")
    parser.add_argument("--validation", type=Path, help="a text file that is not trained on")
    parser.add_argument("--layers", default="all", help='such as "last:75%%"')
    arguments = parser.parse_args()
    given = (arguments.model, arguments.data, arguments.validation)
    if None in given and any(given):
        parser.error("--model, --data and --validation go together; give all, or none for a tiny model")
    arguments.output.mkdir(parents=True)
    files = given if all(given) else make_checkpoint(arguments.output)
    config = DistillationConfig() if all(given) else TINY
    before, after = distill(*files, arguments.output / "distilled", config, arguments.layers)
    print(
        f"KL to the stock model: {before:.4f} converted, {after:.4f} distilled; it is in {arguments.output}/distilled"
    )
