"""The Ray engine, with workers on the machines of a cluster or on this machine. It requires the extra `ray`.

`engine.py` distributes the jobs, `worker.py` runs on the machines, and `address.py` probes an address before `ray.init`.
"""
