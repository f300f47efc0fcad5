"""The Envoy tool broker: the one way out for AI agents.

Envoy carries every byte and denies by default; this package is the service behind its ext_proc and ext_authz that decides.
`exchange.py` is the life of one call, in order; start reading there. `server.py` wires everything together.
"""

__version__ = "0.1.0"
