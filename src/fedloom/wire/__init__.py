"""Messages between server and clients: encoding of trees of tensors, and transforms of messages (fp16, int8, top-k, noise).

Received bytes are parsed and checked, never unpickled. This package does not depend on methods, only on trees of tensors.
"""
