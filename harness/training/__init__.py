"""One training: the budget, the feed, the process that trains, and the conditions it ran under."""
