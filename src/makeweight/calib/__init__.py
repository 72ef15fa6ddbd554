"""From what: texts, token ids, and the hidden states and arguments that enter the blocks."""
