"""The only importer of Envoy's protos and of gRPC: ext_proc, ext_authz, xDS and access logs, all on one Unix socket.

Law: protos are turned into the broker's own words at this edge, and back. A stream is answered or aborted, never ended early:
ext_proc lets a request through when its stream ends cleanly.
"""
