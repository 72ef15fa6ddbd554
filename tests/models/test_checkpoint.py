"""Blocks read from disk are the stored bits, and the model put together from them is transformers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from makeweight.models.inspect import describe
from makeweight.models.load import open_checkpoint
from tests.tiny import FAMILIES, tiny_folder


def _tokens() -> Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_assembled_blocks_give_the_same_logits(family: str, tmp_path: Path) -> None:
    folder = tiny_folder(family, tmp_path / "model", tokenizer=False, max_shard_size="100KB")
    checkpoint = open_checkpoint(folder)
    model = checkpoint.skeleton()
    assert all(parameter.device.type == "meta" for parameter in checkpoint.blocks(model).parameters())
    for i in range(checkpoint.n_blocks):
        checkpoint.load_block(model, i)
    assert checkpoint.dtype is torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert model.config._attn_implementation == reference.config._attn_implementation
    with torch.no_grad():
        assert torch.equal(model(_tokens()).logits, reference(_tokens(), use_cache=False).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    checkpoint.unload_block(model, 1)
    devices = {parameter.device.type for parameter in checkpoint.blocks(model)[1].parameters()}
    assert devices == {"meta"}


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    model = open_checkpoint(tiny_folder("qwen2", tmp_path, tokenizer=False)).skeleton()
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_blocks_and_rest_are_every_stored_tensor_bit_for_bit(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path, max_shard_size="100KB")
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    checkpoint = open_checkpoint(folder)
    read = dict(checkpoint.rest())
    for i in range(checkpoint.n_blocks):
        read |= {
            f"{checkpoint.block_module_path(i)}.{name}": tensor for name, tensor in checkpoint.block_state(i).items()
        }
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in stored)


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    folder = tiny_folder("opt", tmp_path)
    before = open_checkpoint(folder).block_state(1)
    file = folder / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    after = checkpoint.block_state(1)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "decoder.embed_tokens.weight" in dict(checkpoint.rest())
    assert not any("layers" in name for name, _ in checkpoint.rest())
    assert all(
        parameter.device.type != "meta" for parameter in checkpoint.skeleton().get_input_embeddings().parameters()
    )


def test_side_files_tokenizer_and_fingerprint(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path)
    (folder / "modeling_own.py").write_text("")
    checkpoint = open_checkpoint(folder)
    names = {file.name for file in checkpoint.side_files()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert not names & {"config.json", "model.safetensors", "modeling_own.py"}
    tokenizer = checkpoint.tokenizer()
    text = "Zażółć gęślą jaźń\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>user: hi</s>"
    first = checkpoint.fingerprint()
    assert open_checkpoint(folder).fingerprint() == first
    tiny_folder("llama", folder, seed=1)
    assert open_checkpoint(folder).fingerprint() != first


def test_other_weights_beside_the_model(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path)
    names = {name for name, _ in open_checkpoint(folder).rest()}
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")
    assert {name for name, _ in open_checkpoint(folder).rest()} == names


def test_describe(tmp_path: Path) -> None:
    data = describe(open_checkpoint(tiny_folder("llama", tmp_path)))
    assert json.loads(json.dumps(data)) == data
    assert (data["family"], data["architecture"], data["blocks"]) == ("llama", "LlamaForCausalLM", 3)
    assert {"name": "self_attn.k_proj", "out": 32, "in": 64, "count": 3} in data["linears"]
    assert data["parameters"]["quantizable"] == 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert data["group_sizes"] == [16, 32, 64]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 16), (5, 64), (8, 32)])
def test_packed_linears_are_decoded(bits: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    folder = tiny_folder("llama", tmp_path, tokenizer=False)
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(bits)
    tensors, expected = {}, {}
    for name, tensor in load_file(file).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        linear = name.removesuffix(".weight")
        shape, groups = tensor.shape, tensor.shape[1] // group
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        codes = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
        zero = torch.randint(low, high, (shape[0], groups), generator=generator, dtype=torch.int8)
        scale = (torch.rand(shape[0], groups, generator=generator) + 0.1).bfloat16()
        tensors |= {f"{linear}.weight_packed": pack_to_int32(codes, bits), f"{linear}.weight_scale": scale}
        tensors[f"{linear}.weight_shape"] = torch.tensor(shape)
        if not symmetric:
            tensors[f"{linear}.weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0).contiguous()
        shifted = codes.float() - (0 if symmetric else zero.float().repeat_interleave(group, 1))
        expected[name] = (shifted * scale.float().repeat_interleave(group, 1)).bfloat16()
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": bits, "group_size": group, "symmetric": symmetric, "type": "int", "strategy": "group"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype is torch.bfloat16
    for i in range(checkpoint.n_blocks):
        state = checkpoint.block_state(i)
        assert len(state) == 9
        for name in checkpoint.linears():
            key = f"{name}.weight"
            assert torch.equal(state[key], expected[f"{checkpoint.block_module_path(i)}.{key}"])
    checkpoint.load_block(checkpoint.skeleton(), 0)


def test_only_one_block_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_folder("llama", tmp_path, tokenizer=False))
    read: list[str] = []
    original = type(checkpoint._shards).read

    def spy(self: object, name: str) -> Tensor:
        read.append(name)
        return original(self, name)  # type: ignore[arg-type]

    monkeypatch.setattr(type(checkpoint._shards), "read", spy)
    checkpoint.block_state(2)
    assert {name.split(".")[2] for name in read} == {"2"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert len(read) == sum(name.startswith("model.layers.2.") for name in handle.keys())  # noqa: SIM118


def test_tied_weights_may_be_stored_under_either_name(tmp_path: Path) -> None:
    """safetensors' own save_model keeps the first of shared names, a head."""
    whole = tiny_folder("llama-tied", tmp_path / "whole")
    folder = shutil.copytree(whole, tmp_path / "renamed")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ours, theirs = (open_checkpoint(str(path)) for path in (folder, whole))
    first, second = (dict(ckpt.skeleton().named_parameters(remove_duplicate=False)) for ckpt in (ours, theirs))
    assert torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    assert first["model.embed_tokens.weight"] is first["lm_head.weight"]
    assert dict(ours.rest()).keys() == dict(theirs.rest()).keys(), "runtimes look for an embedding, not for its head"
