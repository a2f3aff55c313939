"""What a night leaves to look at: table, pictures, page."""
