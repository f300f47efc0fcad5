"""From a folder of YAML to a frozen snapshot, or to findings that a person can act on.

    bytes ── strict_yaml ──▶ data + positions ── models ──▶ kinds ── compile ──▶ PolicySnapshot
                 └───────────────────┴──────── Finding ────────┴────────┘

Law: there is a snapshot exactly when no finding is an error. Every error of every file is reported in one go, where it stands.
"""
