"""What is generated and checked in: see `__main__`."""
