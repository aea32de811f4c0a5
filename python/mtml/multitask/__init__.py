"""What `mtml.MultiTaskMAML` is made of: groups of tasks, their features and losses, models adapted to new tasks."""
