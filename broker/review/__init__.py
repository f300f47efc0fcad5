"""What reviewers read in the evidence: which denials belong together, and how a run went.

Laws: nothing here decides anything or writes to the record. What is shown of a record was redacted when it was written and is
redacted once more, since an agent chose it; whoever prints it to a terminal makes it printable.
"""
