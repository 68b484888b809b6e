"""Tests of the package against kills, damage and attacks, each case in a process of its own."""
