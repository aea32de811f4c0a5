"""learn2learn.vision."""
