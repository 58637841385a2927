"""Combines the uplinks of a round into one before a method aggregates: robust rules, and what a method only adds up over clients."""
