"""The persistent inner loop on chips that need not be there: its kernel compiled, and a task run through it."""
