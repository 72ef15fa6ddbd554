"""Every bad input ends the command with code 2 and one sentence that names it, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from makeweight.cli import main
from tests.runs import a_text, files
from tests.tiny import tiny_folder


class Workplace:
    """A sound model, a sound text, and the command that uses both unless told otherwise."""

    def __init__(self, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.path, self.capfd = path, capfd
        self.model = tiny_folder("llama", path / "tiny", max_shard_size="100KB")
        self.text = a_text(path / "words.txt")
        self.out = path / "out"
        self.capfd.readouterr()

    def lend_tokenizer(self, model: Path) -> None:
        """Give another model the sound one's tokenizer, and forget what was printed."""
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((self.model / name).read_bytes())
        self.capfd.readouterr()

    def refused(self, *argv: str) -> str:
        """Run a command and return its one sentence; no folder may have appeared."""
        before = files(self.path)
        code = main(argv)
        printed = self.capfd.readouterr()
        assert code == 2, printed.err
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("makeweight: ") and lines[0].endswith(".")
        assert files(self.path) == before
        assert not self.out.exists() or "out/thesis.tex" in before
        return lines[0]

    def quantize(self, *more: str, model: Path | str | None = None, text: Path | None = None) -> str:
        """Refuse a run of `lwc+sde+cl`; options in `more` win over its own."""
        source = str(text or self.text)
        words = ["--model", str(model or self.model), "--out", str(self.out), "--method", "lwc+sde+cl", "--device"]
        words += [*"cpu --scheme W3A16g32 --nsamples 8 --seqlen 32 --steps 2 --dataset".split(), source]
        # The window of 2048 tokens is longer than the tiny model: the recipe says 64.
        recipe = self.path / "eval.json"
        values = {"model": "./m", "out": "o", "eval": {"datasets": [str(self.text)], "seqlen": 64, "windows": 2}}
        recipe.write_text(json.dumps(values))
        return self.refused("quantize", "--recipe", str(recipe), *words, *more)


@pytest.fixture
def work(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.setenv("MAKEWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path, capfd)


def test_a_path_that_does_not_exist(work: Workplace) -> None:
    for path in ("./nowhere", "/no/where/at-all", "nowhere.gguf"):
        assert f"{path} does not exist" in work.quantize(model=path)
        assert f"{path} does not exist" in work.refused("inspect", path)
        assert f"{path} does not exist" in work.refused("evaluate", path)


def test_paths_that_no_system_takes(work: Workplace) -> None:
    long, stranger = "n" * 300, "~nobody-of-this-name/x"
    for words in ((), ("--out", long), ("--model", f"./{long}")):
        assert long in work.quantize(*words, text=None if words else Path(long))
    for words in (("inspect", stranger), ("evaluate", stranger)):
        assert f"{stranger} names the home directory of nobody here" in work.refused(*words)
    assert f"{stranger} names the home" in work.quantize("--out", stranger)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "abc"),
        ("max_position_embeddings", None),
        ("rope_parameters", 5),
        ("hidden_act", "nope"),
        ("dtype", "float99"),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 0),
        ("architectures", 5),
        ("quantization_config", "x"),
    ],
)
def test_a_config_that_describes_no_model(work: Workplace, name: str, value: object) -> None:
    file = work.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    assert "config.json" in work.quantize()


def test_a_tokenizer_that_is_none(work: Workplace) -> None:
    (work.model / "tokenizer.json").write_text("[]")
    assert f"{work.model} has no tokenizer that transformers can load" in work.quantize()


def test_a_folder_without_config(work: Workplace) -> None:
    (work.model / "config.json").unlink()
    assert f"{work.model} has no config.json" in work.quantize()


def test_an_encoder_only_model(work: Workplace) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, architectures=["BertModel"]
    )
    BertModel(config).save_pretrained(work.path / "bert")
    work.capfd.readouterr()
    assert "BertModel is not a causal language model" in work.quantize(model=work.path / "bert")


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_truncated_safetensors_file(work: Workplace, keep: int) -> None:
    file = sorted(work.model.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file} is not a complete safetensors file" in work.quantize()


@pytest.mark.parametrize("junk", [b"", b"\x03\x00\x00\x00", b"\x03\x00\x00\x00" + bytes(range(256)) * 9])
def test_a_truncated_gguf_file(work: Workplace, junk: bytes) -> None:
    file = work.path / "cut.gguf"
    file.write_bytes(b"GGUF" + junk)
    assert f"{file} is not a complete GGUF file" in work.quantize(model=file)
    file.write_bytes(b"JUNK" + junk)
    assert f"{file} is not a GGUF file" in work.quantize(model=file)


@pytest.mark.parametrize("method", ["rtn", "lwc+sde+cl"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_weights_with_nan(work: Workplace, name: str, method: str) -> None:
    for file in work.model.glob("*.safetensors"):
        held = load_file(file)
        if name in held:
            held[name].view(-1)[7] = float("nan")
            save_file(held, file, {"format": "pt"})
    assert f"{name} in {work.model} holds NaN" in work.quantize("--method", method)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--method lwc+sdee+cl", "method 'sdee' is unknown (did you mean 'sde'?)"),
        ("--method rtn+lwc", "method 'rtn+lwc' names 2 ways to the grid"),
        ("--method lsi+sde", "method 'lsi+sde' cannot work: sde contains lsi"),
        ("--method cl", "method 'cl' learns nothing"),
        ("--scheme W3A16g48", "group size 48 does not divide the 64 inputs of model.layers.0.self_attn.q_proj: use"),
        ("--scheme W3A16g48", "use one of 16, 32, 64, or -1"),
        ("--blocks 1:9", "blocks 1:9 do not exist"),
        ("--seqlen 300 --piece 300", "seqlen 300 is longer than the 256 positions of tiny"),
        ("--set sde.bnad=3", "sde has no setting 'bnad' (did you mean 'band'?)"),
        ("--set sde.band=wide", "sde.band='wide' is not possible"),
        ("--set sde.band=-3", "band -3"),
        ("--set lsi.band=3", "'lsi', which is not part of 'lwc+sde+cl'"),
        ("--lr sdee=1e-3", "'sdee', which is not part of 'lwc+sde+cl'"),
        ("--lr sde=-1", "tune.rates.sde=-1.0 is not a rate"),
        ("--scale-dtype int8", "scale dtype 'int8' is unknown"),
        ("--device toaster", "tune.device='toaster' is unknown"),
        ("--seed -1", "seed=-1 is too small"),
        ("--batch-size 99999999999999999999", "tune.batch_size=99999999999999999999 is too large"),
        ("--eval-windows 0", "eval.windows=0 is too small"),
        ("--dataset nowhere.txt", "nowhere.txt cannot be read"),
        ("--dataset wikitext3", "'wikitext3' is neither a file nor a known name (did you mean 'wikitext2'?)"),
        ("--eval-dataset nowhere.txt", "nowhere.txt cannot be read"),
    ],
)
def test_options_that_cannot_work(work: Workplace, options: str, says: str) -> None:
    assert says in work.quantize(*options.split())
    assert says in work.quantize(*options.split(), "--dry-run")


def test_a_tokenizer_of_another_model(work: Workplace) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = work.path / "few"
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(model)
    work.lend_tokenizer(model)
    for refused in (
        work.quantize("--method", "rtn", model=model),
        work.refused("evaluate", str(model), "--dataset", str(work.text), "--seqlen", "64", "--windows", "1"),
    ):
        assert f"{model} has a tokenizer that gives token" in refused and "an embedding of 60 rows" in refused


def test_blocks_that_see_more_than_hidden_states(work: Workplace) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=300)
    BloomForCausalLM(config).save_pretrained(work.path / "bloom")
    work.lend_tokenizer(work.path / "bloom")
    for method in ("rtn", "lwc"):
        said = work.quantize("--method", method, "--scheme", "W4A16", model=work.path / "bloom")
        assert "'alibi' that depends on the samples or their number" in said


def test_an_embedding_with_nan_is_not_evaluated(work: Workplace) -> None:
    file = next(f for f in work.model.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(f))
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][7] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    command = ("evaluate", str(work.model), "--dataset", str(work.text), "--seqlen", "64", "--windows", "1")
    assert "model.embed_tokens.weight in" in work.refused(*command)
    assert "device 'meta' cannot be used here" in work.refused(*command, "--device", "meta")


def test_texts_that_are_empty_or_short(work: Workplace) -> None:
    empty, short = work.path / "empty.txt", work.path / "short.txt"
    empty.write_text(" \n\n")
    short.write_text("only fifty bytes of text to be had in this file...")
    assert f"{empty} holds no text" in work.quantize(text=empty)
    assert f"{short} holds 50 tokens but 8 samples of 32 need 256" in work.quantize(text=short)
    assert f"{empty} holds no text" in work.quantize("--eval-dataset", str(empty))
    assert f"{short} holds 50 tokens but one window needs 64" in work.quantize("--eval-dataset", str(short))


def test_windows_longer_than_the_model(work: Workplace) -> None:
    """Found before the work, not when the result is to be evaluated."""
    recipe = work.path / "long.json"
    values = {"eval": {"datasets": [str(work.text)], "seqlen": 512, "windows": 1}, "scheme": "W3A16g32"}
    recipe.write_text(json.dumps({**values, "model": str(work.model), "out": str(work.out), "method": "rtn"}))
    said = work.refused("quantize", "--recipe", str(recipe))
    assert "512" in said and "longer than the 256 positions of tiny" in said


def test_an_output_folder_that_holds_something_else(work: Workplace) -> None:
    work.out.mkdir()
    (work.out / "thesis.tex").write_text("years of work")
    assert f"{work.out} already holds something else" in work.quantize()
    assert f"{work.model} already holds something else" in work.quantize("--out", str(work.model))
    assert f"{work.text} already holds something else" in work.quantize("--out", str(work.text))


def test_an_output_folder_that_cannot_be_made(work: Workplace) -> None:
    inside = work.text / "out"
    assert str(inside) in work.quantize("--out", str(inside))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a table of names and values"),
        ("{}", "does not say 'model'"),
        ('{"model": "./m"}', "does not say 'out'"),
        ('{"model": "./m", "out": "o", "meth_od": "lwc"}', "'meth_od' (did you mean 'method'?)"),
        ('{"model": 3, "out": "o"}', "model=3"),
        ('{"model": "./m", "out": "o", "scheme": "W3B16"}', "scheme 'W3B16' is not understood"),
        ('{"model": "./m", "out": "o", "scheme": {"bits": 9}}', "choose 2 to 8"),
        ('{"model": "./m", "out": "o", "tune": {"steps": "many"}}', "tune.steps='many' is not a whole number"),
        ('{"model": "./m", "out": "o", "tune": {"rates": {"sde": NaN}}}', "tune.rates.sde=nan is not a rate"),
        ('{"model": "./m", "out": "o", "blocks": [2, 1]}', "blocks 2:1 is empty"),
        ('{"model": "./m", "out": "o", "eval": {"datasets": "wikitext2"}}', "eval.datasets='wikitext2' is not a list"),
        ('{"model": "./m", "out": "o", "eval": {"windows": 2.5}}', "eval.windows=2.5"),
        ('{"model": "./m", "out": "o", "eval": {"windows": ""}}', "eval.windows=''"),
        ('{"model": "./m", "out": "o", "eval": {"windows": [1, 2, 3]}}', "does not fit 2 texts"),
        ('{"model": "./m", "out": "o", "options": {"sde": 3}}', "options.sde is 3"),
    ],
)
def test_bad_recipes(work: Workplace, text: str, says: str) -> None:
    recipe = work.path / "recipe.json"
    recipe.write_text(text)
    assert says in work.refused("quantize", "--recipe", str(recipe))


def test_recipes_that_cannot_be_read(work: Workplace) -> None:
    recipe = work.path / "recipe.json"
    assert "No such file" in work.refused("quantize", "--recipe", str(recipe))
    assert str(work.model) in work.refused("quantize", "--recipe", str(work.model))
    recipe.write_bytes(b"\xff\xfe{}")
    assert "is not UTF-8 text" in work.refused("quantize", "--recipe", str(recipe))
