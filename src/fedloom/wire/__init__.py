"""Messages between server and clients: the encoding of trees of tensors, and transforms of messages (fp16, int8, top-k, noise).

Received bytes are parsed and checked, never unpickled. This package depends only on trees of tensors, not on methods.
"""
