"""Whether a train.py can run at all, found on the CPU before it gets time on the device."""
