"""`python -m broker.cli`."""

from broker.cli.main import main

main()
