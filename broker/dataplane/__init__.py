"""From a snapshot to Envoy's configuration.

Law: a pure function of the snapshot, the site and the certificates; the same input gives the same bytes. Envoy's configuration
grows with the hosts of the catalog, never with the agents, so a changed manifest changes nothing here. Every route passes the
external processor and the gate, and every virtual host list ends in a `*` that denies.
"""
