"""Training: data, features, losses, optimizer and the one loop that serves every head."""
