"""Protocol adapters: bytes → `ToolCall`, denial → bytes. Pure; they see a tool of the catalog and a request, nothing else.

Law: what can't be read in exactly one way is a `Refusal`, never a guess.
"""
