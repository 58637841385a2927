"""`fedloom tune`: hyper-parameters chosen on validation examples, with the same number of settings and rounds for every method.

`space` has the values and ranges that a method is tuned over, `plan` what is tuned, `cells` the runs and their scores, `search` which
settings run, `results` the files that are written, and `folder` all of it together.
"""
