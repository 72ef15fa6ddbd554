"""Every bad input is refused with one sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from makeweight.errors import UserError
from makeweight.export.compressed_tensors import quantization_config
from makeweight.models.load import open_checkpoint
from makeweight.numerics.scheme import Scheme
from tests.tiny import tiny_folder, tiny_model


def refused(model: str | Path, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(model, **kwargs)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder("llama", tmp_path / "tiny", max_shard_size="100KB")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere-at-all", "a/b/c", "nowhere.gguf"])
def test_a_path_that_does_not_exist(name: str) -> None:
    assert "does not exist" in refused(name)
    assert "does not exist" in refused(Path(name))


@pytest.mark.parametrize("kind", ["offline", "absent", "invalid"])
def test_a_hub_name_that_cannot_be_had(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    error = {
        "offline": LocalEntryNotFoundError("no cached copy,\nand no network"),
        "absent": RuntimeError("nobody answers"),
        "invalid": HFValidationError("bad name"),
    }[kind]

    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "someone/model is neither a folder here nor a model that the hub gives" in refused("someone/model")


def test_a_hub_name_is_fetched_without_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {"allow_patterns": []}

    def give(name: str, *, allow_patterns: str | list[str], **kwargs: Any) -> str:
        asked["allow_patterns"] += [allow_patterns] if isinstance(allow_patterns, str) else allow_patterns
        asked["name"] = name
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert open_checkpoint("someone/model").name == "someone/model"
    assert asked["name"] == "someone/model"
    assert not {"*.py", "*.bin"} & set(asked["allow_patterns"])


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)


def test_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(folder)
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "names no model that transformers can build" in refused(folder)


def test_an_encoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)).save_pretrained(
        tmp_path
    )
    assert "BertModel is not a causal language model" in refused(tmp_path)


def test_a_model_without_linears(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)).save_pretrained(tmp_path)
    assert "GPT2LMHeadModel has no nn.Linear in its blocks" in refused(tmp_path)


@pytest.mark.parametrize("keep", [3, 200, -1])
def test_a_truncated_shard(folder: Path, keep: int) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file} is not a complete safetensors file" in refused(folder)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [2, 4]}},
    ],
)
def test_a_header_that_describes_no_tensors(tmp_path: Path, header: object) -> None:
    folder, text = tiny_folder("llama", tmp_path / "tiny"), json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert "model.safetensors is not a complete safetensors file" in refused(folder)


def test_an_index_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    assert "has no weight_map" in refused(folder)


def test_a_whole_file_beside_an_index_is_the_model(tmp_path: Path) -> None:
    """It is what transformers reads, whichever of the two an earlier save has left."""
    folder = tiny_folder("llama", tmp_path / "tiny", seed=1)
    wanted = open_checkpoint(folder).block_state(0)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in open_checkpoint(folder).block_state(0).items())


def test_quantization_that_is_described_wrongly(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for groups in ([1], {"group_0": {"weights": {"num_bits": "x"}}}):
        wrong = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
        file.write_text(json.dumps({**config, "quantization_config": wrong}))
        assert "config.json has a quantization_config that cannot be read" in refused(folder)


def test_transforms_that_only_a_runtime_applies(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for location in ("input", "attn_q", "weight_input"):
        apply = [{"targets": ["Linear"], "location": location}]
        rotated = {"config_groups": {"u": {"type": "hadamard", "apply": apply}}}
        described = {"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": rotated}
        file.write_text(json.dumps({**config, "quantization_config": described}))
        if location == "weight_input":
            assert open_checkpoint(folder).n_blocks
        else:
            assert "rotates what enters its linears as it runs: give the model" in refused(folder)


def test_what_a_config_has_wrong_is_said(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": "64"}))
    said = refused(folder)
    assert "'hidden_size'" in said and "expected int" in said and "trust" not in said


def test_an_encoder_with_a_head_for_language(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    assert "BertLMHeadModel is not a causal language model" in refused(tmp_path)


def test_a_missing_shard(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    assert f"lacks the weight file {file.name}" in refused(folder)


def test_a_missing_tensor_and_a_wrong_shape(tmp_path: Path) -> None:
    tiny_folder("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    assert f"lacks the tensor {name}" in refused(tmp_path)
    save_file({**tensors, name: tensors[name][:-1]}, file, {"format": "pt"})
    assert f"{name} in {tmp_path} has shape [127, 64]" in refused(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    assert "holds no .safetensors weights" in refused(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "pickle files" in refused(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    tiny_folder("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, file, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.block_state(0)
    with pytest.raises(UserError, match=f"{name} in .* holds NaN or infinite weights"):
        checkpoint.block_state(1)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "compressed-tensors"])
def test_other_quantized_formats(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "format": "float-quantized", "config_groups": {}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "is already quantized" in refused(folder)


@pytest.mark.parametrize("given", [{"dynamic": False}, {"strategy": "tensor"}, {"symmetric": False}, {"type": "float"}])
def test_activations_that_are_rounded_in_another_way(folder: Path, given: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(Scheme.parse("W8A8"), ())
    inputs = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {**inputs, **given}
    (folder / "config.json").write_text(json.dumps(config))
    assert "rounds activations otherwise" in refused(folder)


@pytest.mark.parametrize("place", ["kv_cache_scheme", "output_activations"])
def test_what_else_is_rounded_as_a_model_runs(folder: Path, place: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    found = config["quantization_config"] = quantization_config(Scheme.parse("W4A16"), ())
    (found if place == "kv_cache_scheme" else found["config_groups"]["group_0"])[place] = {"num_bits": 8, "type": "int"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "rounds outputs of its linears, or the cache of keys and values, as it runs" in refused(folder)


def test_an_adapter_beside_the_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter beside its model: merge it first" in refused(folder)


def test_no_tokenizer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_folder("llama", tmp_path, tokenizer=False))
    with pytest.raises(UserError, match="has no tokenizer that transformers can load"):
        checkpoint.tokenizer()
