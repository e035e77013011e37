"""``vllm serve`` on a converted checkpoint, asked by the OpenAI client on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import openai
import tokenizers
import transformers

from tests.engines.served import Answer, assert_same_answers, make, prompts

START_SECONDS = 280


# One word a token. No special one may be part of another, in which the tokenizer would find it.
VOCABULARY = {"<unk>": 0, "<eos>": 2} | {f"w{number}": number for number in range(128) if number not in (0, 2)}
WORDS = {number: word for word, number in VOCABULARY.items()}


def write_tokenizer(path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    wrapped.save_pretrained(path)


@contextmanager
def server(path: Path, log: Path) -> Iterator[openai.OpenAI]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.engines.vllm_command", "serve", str(path)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    root = Path(__file__).parents[2]
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            wait_for(client, process, log)
            yield client
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(client: openai.OpenAI, process: Any, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise AssertionError(f"the server does not answer:\n{log.read_text()[-3000:]}")


@pytest.mark.timeout(START_SECONDS + 120)
def test_server_answers_as_transformers(checkpoints: Path, tmp_path: Path) -> None:
    path = make("qwen3_moe", checkpoints, "farskip")
    write_tokenizer(path)
    with server(path, tmp_path / "log") as client:
        answers = [ask(client, str(path), prompt) for prompt in prompts()]
    assert_same_answers(answers, path)


def ask(client: openai.OpenAI, model: str, prompt: list[int]) -> Answer:
    choice = client.completions.create(
        model=model,
        prompt=" ".join(WORDS[token] for token in prompt),
        max_tokens=6,
        temperature=0,
        logprobs=4,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    ).choices[0]
    assert choice.logprobs is not None and choice.logprobs.top_logprobs is not None
    steps = [{VOCABULARY[word.strip()]: value for word, value in step.items()} for step in choice.logprobs.top_logprobs]
    return Answer([VOCABULARY[word] for word in choice.text.split()], steps)
