"""llama.cpp, as node-llama-cpp ships it, loads our files: same weights, tokens and perplexity, and it chats.

Needs node and npm; the first run installs about 700 MB.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from makeweight.evals.perplexity import window_nll
from makeweight.export.gguf_blocks import BLOCKS, Block, pack
from makeweight.export.run import export_model
from makeweight.models.gguf import demo_model
from makeweight.models.load import open_checkpoint
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Eval, Recipe
from tests.clients import environments
from tests.runs import a_text, our_logits, small
from tests.tiny import tiny_folder

pytestmark = pytest.mark.client

VERSION = "3.22.1"
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
DATA = Path(os.environ.get("MAKEWEIGHT_DATA") or Path(__file__).parents[3] / "shared" / "data")
WIKITEXT = DATA / "wikitext2" / "wiki.test.raw"
TOKENS = 2000
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1984, 1234567 people paid $3.50 (or 2,75 €) for 007.",
    "Où est l'été? Ça coûte 12€ à Zürich; naïve façade, Αθήνα, 東京, 🙂!",
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # it's a circle\n\n\n\tif x<=y and not z:\n",
    "<|im_start|>user\nWe're here, they'd say.<|im_end|>\n",
)


@pytest.fixture(scope="session")
def package() -> Path:
    """Return the folder of node-llama-cpp, installed once."""
    if shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    root = environments.home() / f"node-llama-cpp-{VERSION}"
    if not (root / "ready").is_file():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        (root / "package.json").write_text("{}")
        options = ["--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(["npm", "install", *options, f"node-llama-cpp@{VERSION}"], cwd=root, check=True)
        (root / "ready").touch()
    return root / "node_modules" / "node-llama-cpp"


Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def ask(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Return a function from an exported folder and a request to llama.cpp's answer."""
    request = tmp_path_factory.mktemp("requests") / "request.json"

    def answer(folder: Path, **wanted: Any) -> dict[str, Any]:
        (file,) = folder.glob("*.gguf")
        request.write_text(json.dumps({"model": str(file), **wanted}))
        command = ["node", str(SCRIPT), str(package), str(request)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads(done.stdout.strip().splitlines()[-1])
        assert "error" not in found, found
        return found

    return answer


def a_window(folder: Path) -> Tensor:
    """Return the first tokens of WikiText-2's test split, [1, T]."""
    if not WIKITEXT.is_file():
        pytest.skip(f"{WIKITEXT} is missing: set MAKEWEIGHT_DATA to the folder that holds wikitext2/wiki.test.raw")
    text = WIKITEXT.read_text(encoding="utf-8")[: TOKENS * 8]
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids[:TOKENS]])


@pytest.fixture(scope="session")
def written(exported: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a scheme to the folder with its GGUF file, beside the solved one.

    Of 2 bits only two blocks in the middle get any: a model of which all have them, solved by round-to-nearest, is as
    good as noise, and so would be its perplexity.
    """

    def write(scheme: str) -> Path:
        if not scheme.startswith("W2"):
            return exported(scheme, "gguf")
        root = tmp_path_factory.mktemp("two-bits")
        recipe = Recipe(
            model=str(demo_model()),
            out=str(root / "solved"),
            method="rtn",
            scheme=Scheme.parse(scheme),
            blocks=(14, 16),
            eval=Eval(datasets=()),
        )
        quantize(recipe)
        return export_model(root / "solved", ["gguf"], out=root)[0].path

    return write


@pytest.mark.parametrize(
    ("scheme", "block"),
    [("W4A16g64_sym", "Q4_0"), ("W4A16g64", "Q4_1"), ("W8A16g64_sym", "Q8_0"), ("W2A16g64_sym", "Q2_0")],
)
def test_perplexity_is_ours(
    scheme: str, block: str, written: Callable[[str], Path], ask: Ask, tell: Callable[[str], None]
) -> None:
    """What is left of a difference comes from llama.cpp, which rounds what enters a linear to 8 bits."""
    folder = written(scheme)
    assert [file.name for file in folder.glob("*.gguf")] == [f"solved-{block}.gguf"]
    ckpt = open_checkpoint(folder.parent / "solved")
    ckpt.dtype = torch.float32  # else weights would be rounded to bfloat16 when they are read
    window = a_window(folder.parent / "solved")
    ours = math.exp(float(window_nll(ckpt, window, dtype=torch.float32)[0]))
    found = ask(folder, tokens=window[0].tolist())
    assert len(found["nll"]) == TOKENS - 1
    theirs = math.exp(sum(found["nll"]) / len(found["nll"]))
    tell(f"{block}: llama.cpp {found['build']} {theirs:.4f}, ours {ours:.4f}, {theirs / ours - 1:+.3%}")
    assert theirs == pytest.approx(ours, rel=5e-3)


def test_tokens_and_chat(exported: Callable[[str, str], Path], ask: Ask) -> None:
    folder = exported("W8A16g64_sym", "gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "solved")
    found = ask(folder, texts=TEXTS, chat="What is the capital of France?")
    for text, ids in zip(TEXTS, found["texts"], strict=True):
        assert ids == tokenizer(text)["input_ids"], text
    assert found["template"] == tokenizer.chat_template
    assert "Paris" in found["reply"], found["reply"]


def with_merges(folder: Path) -> None:
    """Save a byte-level tokenizer that merges something: llama.cpp reads none that merges nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<s>", "</s>", "<pad>", "th", "the"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "scheme", "rope"),
    [
        ("llama", "W8A16g32_sym", None),
        ("llama-tied", "W8A16g32_sym", LLAMA3),
        ("llama", "W7A16g64", LINEAR),
        ("mistral", "W8A8", None),
        ("qwen2", "W8A16_sym", None),
        ("qwen3", "W6A16g32_sym", LINEAR),
    ],
)
def test_every_family(family: str, scheme: str, rope: dict[str, Any] | None, ask: Ask, tmp_path: Path) -> None:
    """Token by token the losses of random models agree; with rows in the wrong order they are 3 apart."""
    source = tiny_folder(family, tmp_path / "source", tokenizer=False, dtype=torch.float32)
    with_merges(source)
    config = json.loads((source / "config.json").read_text())
    if rope is not None:
        config["rope_parameters"] = rope
    config["sliding_window"] = None
    (source / "config.json").write_text(json.dumps(config))
    text = a_text(tmp_path / "words.txt")
    quantize(small(source, tmp_path / "solved", text, method="rtn", scheme=Scheme.parse(scheme), blocks=(1, 2)))
    (item,) = export_model(tmp_path / "solved", ["gguf"], out=tmp_path)
    tokens_NT = torch.randint(0, 256, (1, 120), generator=torch.Generator().manual_seed(0))
    found = ask(item.path, tokens=tokens_NT[0].tolist(), texts=["then the thing"])
    losses = -our_logits(tmp_path / "solved", tokens_NT)[0].float().log_softmax(-1)
    ours = losses[:-1].gather(1, tokens_NT[0, 1:, None])[:, 0]
    off = (torch.tensor(found["nll"]) - ours).abs()
    print(f"{family} {scheme}: {found['build']} off by {float(off.mean()):.4f}, at most {float(off.max()):.4f}")
    assert float(off.mean()) < 0.15
    expected = AutoTokenizer.from_pretrained(source)("then the thing")["input_ids"]
    assert found["texts"] == [expected]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_ggml_decodes_what_we_packed(block: Block, package: Path) -> None:
    """Its own decoder, called on random blocks of every type."""
    library = package.parent / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64" / "libggml-base.so"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or not library.is_file():
        pytest.skip("its library is loaded by name on x86-64 Linux only")
    decoder = getattr(ctypes.CDLL(str(library)), f"dequantize_row_{block.name.replace('Q', 'q')}")
    decoder.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    bits = {"Q2_0": 2, "Q3_K": 3, "Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q8_0": 8}[block.name]
    scheme = Scheme(bits=bits, group_size=256, symmetric=not block.offset)
    generator = torch.Generator().manual_seed(0)
    shape = (24, 4)
    tensor = QTensor(
        codes_OI=torch.randint(scheme.qmin, scheme.qmax + 1, (24, 1024), generator=generator, dtype=torch.int8),
        scale_OG=(torch.rand(shape, generator=generator) + 0.01).half(),
        zero_OG=torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8) if block.offset else None,
        scheme=scheme,
    )
    packed, found = pack(tensor, block), np.empty((24, 1024), np.float32)
    decoder(packed.ctypes.data, found.ctypes.data, found.size)
    expected = tensor.dequantize(torch.float32)
    assert torch.allclose(torch.from_numpy(found), expected, rtol=0, atol=0.01 if block.offset else 0)
