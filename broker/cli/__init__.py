"""The command line: one file a verb. Exit codes: 0 yes, 1 findings or a denial, 2 wrong usage, 3 the broker is at fault."""
