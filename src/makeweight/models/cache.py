"""Keys and values of a model that writes, each in a place as large as they will be.

transformers lays them out anew for every token. That takes time, and memory as well, which the heap keeps: none fits
where the one before was.

Shapes: B texts, K heads of keys and values, T tokens, D inputs and E outputs of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def sized_cache(config: PreTrainedConfig, length: int) -> Cache:
    """Return an empty cache for texts of at most `length` tokens.

    A layer that forgets within that length, or keeps something else than keys and values, is transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [SizedLayer(length) if _keeps_all(layer, length) else layer for layer in cache.layers]
    return cache


class SizedLayer(DynamicLayer):
    """The keys and values of one layer: views of the first tokens of two places made for `length`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.places: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add [B, K, T, D] and [B, K, T, E] behind what is there, and return all of both."""
        added = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.places = tuple(new.new_empty(*new.shape[:2], self.length, new.shape[3]) for new in added)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for place, new in zip(self.places, added, strict=True):
            place[:, :, start:end] = new
        self.keys, self.values = (place[:, :, :end] for place in self.places)
        return self.keys, self.values


def _keeps_all(layer: object, length: int) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.sliding_window >= length
    return type(layer) is DynamicLayer
