"""Federations of real devices with Flower: the server, node agents, messages, keys, certificates and service files.

`running.py` runs an experiment on a federation, and `engine.py` contains the engine that sends requests to nodes. Only this package
imports Flower.
"""
