"""`fedloom tune`: choose hyper-parameters on validation examples, with equal numbers of candidates and rounds for all methods.

`space` defines the values and ranges of hyper-parameters, and `plan` defines a tuning. `cells` runs candidates and reads their scores,
`search` chooses which candidates run, and `results` writes the result files. `folder` runs a whole tuning in its folder.
"""
