"""Federations of real devices, through Flower: server, node agents, their messages, keys, certificates and service files.

`running.py` runs an experiment on one; `engine.py` is the engine that speaks to the nodes. Only this room imports Flower.
"""
