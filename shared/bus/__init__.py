"""The message bus: on NATS (nats.py) or inside one process (memory.py), and who lives on it (roster.py, sender.py)."""
