"""What is measured, and how: times, peaks, operations, memory, host time; and what must match first."""
