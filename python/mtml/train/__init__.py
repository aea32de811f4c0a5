"""The trainer behind `mtml train`; its parts load when a command runs, and matplotlib only when a plot is drawn."""
