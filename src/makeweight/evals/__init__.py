"""How good: perplexity and its kin, measured on the files that were written."""
