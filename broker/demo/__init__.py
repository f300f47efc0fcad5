"""The guided tour: a whole broker on loopback, with tools of its own, and an agent's calls sent through it.

Law: nothing is staged. The tools keep what reached them, the tour compares that with what should have, and a difference is
an error.
"""
