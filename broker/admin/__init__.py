"""The admin API. Over TCP it says how the broker is and shows public keys; what changes anything is on a Unix socket (0600)."""
