"""The Ray engine: workers on the machines of a cluster, or on this one. Needs the extra `ray`.

`engine.py` hands out the work, `worker.py` runs on the machines, `address.py` checks an address before Ray tries it.
"""
