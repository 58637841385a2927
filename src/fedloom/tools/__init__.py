"""What people do with experiments: compare several, check a method, time engines, export a model, estimate a device's cost.

Each module is one command's work without its command line (`cli`). Tools do not import each other.
"""
