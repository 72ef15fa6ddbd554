"""Keys and values in places of their final size: the same predictions as without any, and nothing laid out anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from makeweight.models.cache import SizedLayer, sized_cache
from tests.tiny import FAMILIES, tiny_model

LENGTH = 20


def step_by_step(model: Any, tokens_BT: Tensor, cache: Cache) -> Tensor:
    """Return the logits of a text that is read as one that is written: first some tokens, then one at a time."""
    parts = [tokens_BT[:, :7], *tokens_BT[:, 7:].split(1, 1)]
    with torch.no_grad():
        return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_those_of_transformers_cache_and_of_none(family: str) -> None:
    model = tiny_model(family)
    tokens_BT = torch.randint(0, 256, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    cache = sized_cache(model.config, LENGTH)
    found = step_by_step(model, tokens_BT, cache)
    torch.testing.assert_close(found, step_by_step(model, tokens_BT, DynamicCache(config=model.config)))
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=tokens_BT, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == LENGTH


def test_keys_and_values_stay_where_they_are() -> None:
    layer = SizedLayer(5)
    places = set()
    for number in range(5):
        new = torch.full((2, 3, 1, 4), float(number))
        keys, values = layer.update(new, -new)
        places.add((keys.data_ptr(), values.data_ptr()))
        assert torch.equal(keys[0, 0, :, 0], torch.arange(number + 1.0)) and torch.equal(values, -keys)
    assert len(places) == 1


@pytest.mark.parametrize(("length", "own"), [(8, SizedLayer), (9, DynamicSlidingWindowLayer)])
def test_a_layer_that_forgets_within_the_text_is_transformers_own(length: int, own: type) -> None:
    config = tiny_model("mistral").config
    config.sliding_window = 8
    assert {type(layer) for layer in sized_cache(config, length).layers} == {own}
