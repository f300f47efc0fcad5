"""The policy core. Pure: no clock, network, files, logging or protos; `now` and randomness come in as arguments."""
