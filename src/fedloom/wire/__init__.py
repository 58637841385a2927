"""Messages between server and clients: trees of tensors as bytes, and what is done to them on the way (fp16, int8, top-k, noise).

Bytes from outside are parsed and checked, never unpickled. Knows methods only by the trees they send.
"""
