"""Who proposes: agents of every kind, what they are told, and where they work."""
