"""Tools for experiments: compare methods, check a method, time engines, export models, estimate costs on devices.

Each module does the work of one command; `cli` has the command line. Tools do not import each other.
"""
