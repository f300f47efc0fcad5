"""What people look at before and after: policy tests, denied calls, and what a manifest would have to say to allow them.

Law: nothing here decides on a call. Calls are judged by the exchange itself (`broker/rehearsal.py`), denials are read from the
record, and a manifest changes by a reviewed commit.
"""
