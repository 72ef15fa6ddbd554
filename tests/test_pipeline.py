"""What a run writes: a folder that transformers loads with our weights, and in which nothing else has changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from makeweight.evals.perplexity import evaluate
from makeweight.methods.base import Context, Grid
from makeweight.methods.grid.gptq import Gptq
from makeweight.models.load import open_checkpoint
from makeweight.numerics.qtensor import QTensor
from makeweight.numerics.scheme import Scheme
from makeweight.pipeline import quantize
from makeweight.recipe import Eval, Recipe, Tune
from makeweight.report.record import Record
from tests.runs import a_text, our_logits, same_bits, small, tensors, weights_of
from tests.tiny import tiny_folder

FAMILIES = ("llama", "llama-tied", "qwen3", "gemma3", "opt", "phi3", "gpt-neox")
PARTS = {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}
NOT_MEASURED = Eval(datasets=(), seqlen=64)
pytestmark = pytest.mark.usefixtures("known_rate")


def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def loaded(folder: str | Path) -> Any:
    """Load a folder the way its users do, and run it once: packed weights unfold in the first forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model(tokens(), use_cache=False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_every_family(family: str, tmp_path: Path, text: Path) -> None:
    source = tiny_folder(family, tmp_path / "source", max_shard_size="100KB")
    (source / "LICENSE.txt").write_bytes(b"free\r\n\xff")
    before = {name: tensor.clone() for name, tensor in tensors(source).items()}
    record = quantize(small(source, tmp_path / "out", text, method="cl+sde+lwc"))
    out = tmp_path / "out"

    solved = {name.removesuffix(".weight") for name in weights_of(out)}
    after = tensors(out)
    kept = {name for name in before if name.removesuffix(".weight") not in solved}
    assert len(before) - len(kept) == len(solved) > 0, "a quantized linear has another name in the file"
    assert after.keys() == kept | {f"{linear}.{part}" for linear in solved for part in PARTS}
    assert all(same_bits(after[name], before[name]) for name in kept)
    assert all(same_bits(tensor, before[name]) for name, tensor in tensors(source).items()), "the source has changed"

    sides = open_checkpoint(source).side_files()
    assert {"tokenizer.json", "LICENSE.txt"} <= {file.name for file in sides}
    assert all((out / file.name).read_bytes() == file.read_bytes() for file in sides)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((source / "config.json").read_text())
    assert not list(out.glob("*.part"))

    assert [block["block"] for block in record.blocks] == [0, 1, 2]
    assert all(len(block["digest"]) == len(solved) / 3 for block in record.blocks)
    assert record.blocks[0]["error_after"] < record.blocks[0]["error_before"], "nothing was learned"
    assert all(block["error_after"] <= block["error_before"] for block in record.blocks), "learning made a block worse"
    assert record.file_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert Recipe.load(out / "recipe.json").method == "cl+sde+lwc"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_was_written(family: str, tmp_path: Path, text: Path) -> None:
    source = tiny_folder(family, tmp_path / "source")
    out = tmp_path / "out"
    quantize(small(source, out, text, method="rtn", eval=NOT_MEASURED))
    model = loaded(out)
    assert model.dtype == torch.bfloat16
    for name, weight in weights_of(out).items():
        assert torch.equal(model.get_parameter(name), weight), name
    with torch.no_grad():
        theirs = model(tokens(), use_cache=False).logits
    torch.testing.assert_close(theirs, our_logits(out, tokens()))
    assert not torch.equal(theirs, our_logits(source, tokens())), "the model is still the original"
    embedding = model.get_input_embeddings().weight
    tied = family in ("llama-tied", "gemma3", "opt")
    assert (model.get_output_embeddings().weight is embedding) == tied
    assert ("lm_head.weight" in tensors(out)) == ("lm_head.weight" in tensors(source))
    ours, original = (AutoTokenizer.from_pretrained(folder)("Zażółć")["input_ids"] for folder in (out, source))
    assert ours == original and len(ours) == len("Zażółć".encode())


@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "gemma3", "opt", "phi3"])
def test_scales_are_folded_into_what_is_written(family: str, tmp_path: Path, text: Path) -> None:
    source, out = tiny_folder(family, tmp_path / "source"), tmp_path / "out"
    quantize(small(source, out, text, method="scale+let+lwc", eval=NOT_MEASURED))
    before, after = tensors(source), tensors(out)
    changed = {name for name in before.keys() & after.keys() if not same_bits(before[name], after[name])}
    spec = open_checkpoint(source).spec
    assert changed >= {f"{spec.blocks}.0.{norm}.weight" for norm in spec.norms}
    assert all(name.startswith(f"{spec.blocks}.") for name in changed)
    with torch.no_grad():
        theirs = loaded(out)(tokens(), use_cache=False).logits
    torch.testing.assert_close(theirs, our_logits(out, tokens()))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_schemes(bits: int, group: int, symmetric: bool, llama: Path, tmp_path: Path, text: Path) -> None:
    """Round-to-nearest is compressed-tensors' own, and transformers reads the same weights from the files."""
    scheme = Scheme(bits=bits, group_size=group, symmetric=symmetric)
    record = quantize(small(llama, tmp_path / "out", text, method="rtn", scheme=scheme, eval=NOT_MEASURED))
    ours, original = weights_of(tmp_path / "out"), tensors(llama)
    for name, weight in ours.items():
        assert torch.equal(weight, reference(original[name], scheme)), name
    sizes = [weight.numel() for weight in ours.values()]
    groups = [weight.numel() // (weight.shape[1] if group == -1 else group) for weight in ours.values()]
    expected = bits + sum(groups) * (16 + (0 if symmetric else bits)) / sum(sizes)
    assert record.bits_per_weight == pytest.approx(expected, rel=1e-12)
    theirs = loaded(tmp_path / "out")
    for name, weight in ours.items():
        assert torch.equal(theirs.get_parameter(name), weight), name


def reference(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return what compressed-tensors makes of a bf16 weight that is rounded to the nearest point in float32."""
    group = scheme.group_of(weight.shape[1], "w")
    args = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy=QuantizationStrategy.GROUP,
        group_size=group,
        scale_dtype=torch.bfloat16,
    )
    groups = weight.float().unflatten(1, (-1, group))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return fake_quantize(weight.float(), scale.float(), zero, args).bfloat16()


def test_evaluating_the_folder_gives_the_record(llama: Path, tmp_path: Path, text: Path) -> None:
    other = a_text(tmp_path / "other.txt", 30)
    wanted = Eval(datasets=(str(text), str(other)), seqlen=64, windows=(3, 2))
    record = quantize(small(llama, tmp_path / "out", text, method="lwc", eval=wanted))
    for folder, results in ((tmp_path / "out", record.perplexities), (llama, record.baselines)):
        again = evaluate(str(folder), datasets=wanted.datasets, seqlen=64, windows=(3, 2), device="cpu")
        alone = {"seconds": 0, "divergence": None, "same_top": None}
        assert [replace(result, **alone) for result in again] == [replace(result, **alone) for result in results]
        assert [result.windows for result in results] == [3, 2]
    assert record.perplexities[0].nll != record.baselines[0].nll
    assert Record.load(tmp_path / "out") == record


def test_only_the_chosen_blocks_change(llama: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    record = quantize(small(llama, out, text, blocks=(1, 2)))
    assert [block["block"] for block in record.blocks] == [1]
    before, after = tensors(llama), tensors(out)
    chosen = {name for name in weights_of(out) if name.startswith("model.layers.1.")}
    assert len(chosen) == 7
    assert {name for name in before if name not in after} == chosen
    assert all(same_bits(after[name], before[name]) for name in before.keys() - chosen)
    ours = weights_of(out)
    assert {name for name, weight in ours.items() if not torch.equal(weight, before[name])} == chosen
    theirs = loaded(out)
    assert all(torch.equal(theirs.get_parameter(name), weight) for name, weight in ours.items())


def test_the_largest_seed(llama: Path, tmp_path: Path, text: Path) -> None:
    largest = small(llama, tmp_path / "out", text, method="lwc", seed=2**63 - 1, eval=NOT_MEASURED)
    digests = [quantize(replace(largest, out=str(tmp_path / name))).digest for name in "ab"]
    other = quantize(replace(largest, out=str(tmp_path / "c"), seed=2**63 - 2)).digest
    assert digests[0] == digests[1] != other


def test_a_rate_of_zero_learns_nothing(llama: Path, tmp_path: Path, text: Path) -> None:
    lwc = small(llama, tmp_path / "lwc", text, method="lwc", eval=NOT_MEASURED)
    still = replace(lwc, method="lwc+sde", out=str(tmp_path / "still"), tune=replace(lwc.tune, rates={"sde": 0.0}))
    moving = replace(still, out=str(tmp_path / "moving"), tune=lwc.tune)
    assert quantize(lwc).digest == quantize(still).digest != quantize(moving).digest
    ours, other = tensors(tmp_path / "lwc"), tensors(tmp_path / "still")
    assert ours.keys() == other.keys()
    assert all(same_bits(ours[name], other[name]) for name in ours)


def test_the_same_input_is_the_usual_one_in_the_first_block_only(llama: Path, tmp_path: Path, text: Path) -> None:
    more = {"tune": Tune(steps=20, device="cpu"), "eval": NOT_MEASURED}
    plain, held = (quantize(small(llama, tmp_path / m, text, method=m, **more)) for m in ("lwc", "lwc+aug"))
    first, *rest = ((a["digest"], b["digest"]) for a, b in zip(plain.blocks, held.blocks, strict=True))
    assert first[0] == first[1]
    assert all(a != b for a, b in rest)


def test_sde_of_band_zero_is_lsi(llama: Path, tmp_path: Path, text: Path) -> None:
    lsi = small(llama, tmp_path / "lsi", text, method="lsi", eval=NOT_MEASURED)
    sde = replace(lsi, method="sde", out=str(tmp_path / "sde"), options={"sde": {"band": 0}})
    assert quantize(lsi).digest == quantize(sde).digest
    ours, other = tensors(tmp_path / "lsi"), tensors(tmp_path / "sde")
    assert ours.keys() == other.keys()
    assert all(same_bits(ours[name], other[name]) for name in ours)


def test_weights_are_quantized_as_they_are_stored(tmp_path: Path, text: Path) -> None:
    """A run that calibrates works in bfloat16, but does not round a wider model's weights to it first."""
    model = tiny_folder("llama", tmp_path / "model", dtype=torch.float32)
    plain, learned = tmp_path / "plain", tmp_path / "learned"
    quantize(small(model, plain, text, method="rtn", scheme=Scheme.parse("W8A16g32"), eval=NOT_MEASURED))
    recipe = small(model, learned, text, method="rtn+e2e", scheme=Scheme.parse("W8A16g32"), eval=NOT_MEASURED)
    quantize(replace(recipe, options={"e2e": {"steps": 1}}))
    ours, other = tensors(plain), tensors(learned)
    assert all(same_bits(ours[name], other[name]) for name in ours if name.endswith("weight_packed"))


def test_learning_after_eight_bit_codes_sees_the_weights(llama: Path, tmp_path: Path, text: Path) -> None:
    """The network that 8 bits leave is close to the original; raw codes in place of its weights are not."""
    recipe = small(llama, tmp_path / "out", text, method="rtn+e2e", scheme=Scheme.parse("W8A16_sym"), eval=NOT_MEASURED)
    record = quantize(replace(recipe, options={"e2e": {"steps": 1}}))
    assert record.finetune["before"] < 0.05


def test_a_result_can_be_quantized_again(llama: Path, tmp_path: Path, text: Path) -> None:
    """A folder of ours is an ordinary model; the marker and the records in it are not part of that model."""
    first, second = tmp_path / "first", tmp_path / "second"
    quantize(small(llama, first, text, method="rtn", scheme=Scheme.parse("W2A16g16"), eval=NOT_MEASURED))
    recipe = small(first, second, text, method="rtn", scheme=Scheme.parse("W8A16g32"), eval=NOT_MEASURED)
    record = quantize(recipe)
    before, after = weights_of(first), weights_of(second)
    scheme = Scheme.parse("W8A16g32")
    assert all(torch.equal(after[name], reference(before[name], scheme)) for name in before)
    assert quantize(recipe) == record, "the folder belongs to this run, not to the one its source came from"
    assert Record.load(first).digest != record.digest


def test_the_error_noted_of_a_block_is_that_of_its_codes(tmp_path: Path, text: Path) -> None:
    """GPTQ rounds what was learned under plain rounding, whose error is noted beside its own."""
    source = tiny_folder("llama", tmp_path / "source")
    plain, rounded = (
        quantize(small(source, tmp_path / method, text, method=method, eval=NOT_MEASURED)).blocks[0]
        for method in ("lwc", "lwc+gptq")
    )
    assert rounded["error_nearest"] == plain["error_after"] != rounded["error_rounded"]
    assert rounded["error_after"] == min(rounded["error_nearest"], rounded["error_rounded"])
    assert "error_nearest" not in plain


def test_learned_codes_stay_where_gptq_makes_them_worse(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is learned, GPTQ's codes are what was asked for, whatever they give."""

    def lowest(_: Gptq, name: str, weight_OI: Tensor, __: Tensor, grid: Grid, ___: Context) -> tuple[QTensor, Any]:
        codes = grid.codes({name: weight_OI})[name]
        return replace(codes, codes_OI=torch.zeros_like(codes.codes_OI)), {}

    monkeypatch.setattr(Gptq, "codes", lowest)
    source = tiny_folder("llama", tmp_path / "source")
    records = {
        method: quantize(small(source, tmp_path / method, text, method=method, eval=NOT_MEASURED))
        for method in ("lwc", "lwc+gptq", "gptq")
    }
    kept, alone = records["lwc+gptq"].blocks[0], records["gptq"].blocks[0]
    assert kept["error_after"] == kept["error_nearest"] < kept["error_rounded"]
    assert alone["error_after"] == alone["error_rounded"] > alone["error_nearest"]
    plain, learned = weights_of(tmp_path / "lwc"), weights_of(tmp_path / "lwc+gptq")
    assert all(torch.equal(learned[name], plain[name]) for name in plain)
