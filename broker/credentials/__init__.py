"""Credentials: what a tool wants, made at the moment of an allowed call and never shown to the agent.

Law: a secret is held by reference until it is needed; whatever holds one prints as `[redacted]`.
"""
