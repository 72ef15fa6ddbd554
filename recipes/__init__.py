"""Runs worth repeating: each file is one, started with `python -m recipes.NAME`; nothing imports this folder."""
