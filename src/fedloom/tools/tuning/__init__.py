"""`fedloom tune`: choose hyper-parameters on validation examples, with equal numbers of settings and rounds for all methods.

`space` defines the values and ranges of hyper-parameters, and `plan` defines a tuning. `cells` runs settings and reads their scores,
`search` chooses which settings run, and `results` writes the result files. `folder` runs a whole tuning in its folder.
"""
