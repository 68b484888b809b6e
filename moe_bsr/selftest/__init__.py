"""Attacks on the product, to be run by hand: kills, damaged runs, mutated configurations, hostile files."""
