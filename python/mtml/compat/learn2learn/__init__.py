"""learn2learn by its own names."""
