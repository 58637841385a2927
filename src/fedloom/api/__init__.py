"""The Python interface: `runs` (`fedloom.run`, `open`, `resume`, `load_data` and `Run`) and `comparison` (`fedloom.compare`)."""
