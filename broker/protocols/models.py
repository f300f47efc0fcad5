"""What the adapters of model providers share."""


def with_max_output(body: bytes, field: str, value: int) -> bytes:
    """The JSON object `body` with a first member more."""
    head, brace, rest = body.partition(b"{")
    return head + brace + f'"{field}":{value},'.encode() + rest
