"""The GPU: which one, by the driver's own library; who else is on it, and what it needs beside its driver."""
