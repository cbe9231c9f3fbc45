"""Sweeps: many runs from one config, on whatever machine there is, and what came out of them."""
