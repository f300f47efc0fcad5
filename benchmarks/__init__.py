"""The broker beside a bare Envoy and beside no proxy at all. See README.md; run with `python -m benchmarks.run`."""
