"""The Ray engine: workers on the machines of a cluster, or on this machine. Needs the extra `ray`.

`engine.py` distributes the work, `worker.py` runs on the machines, `address.py` probes an address before `ray.init`.
"""
