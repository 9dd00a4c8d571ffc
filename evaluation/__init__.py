"""Sec. 4, A.1 and A.2: the protocol, metrics, tables, the user study, puppeteering and timing."""
