"""One module per model family: which of its forms a plan covers, and how to read their weights."""
