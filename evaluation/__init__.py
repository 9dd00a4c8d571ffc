"""The figures of Sec. 4, A.1 and A.2: the protocol, the metrics, the tables and the puppeteering."""
