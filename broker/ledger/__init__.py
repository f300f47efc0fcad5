"""What was spent and what was taken back. Limits come with the ledger's reservations; revocations live here already."""
