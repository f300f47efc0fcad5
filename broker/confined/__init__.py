"""A command with no way out but the broker: its environment, its view of the machine, its ceilings, its end.

    broker run ── unshare(1) ── inside.py, process 1 of the command's namespaces ── setpriv(1) ── the command

Laws: the network namespace has a loopback interface and nothing else, so that it is not a rule that keeps the command in but that
there is nowhere to go; every address in it leads to itself. Whatever of the command is left dies with process 1, that with
`unshare`, that with `broker run`. Nothing here is kept on disk, so that nothing can be left behind.
"""
