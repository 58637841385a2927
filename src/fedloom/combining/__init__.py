"""Combination of a round's uplinks into one before a method aggregates, by robust rules or by addition of their tensors."""
