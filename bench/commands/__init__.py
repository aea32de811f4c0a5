"""Commands of ``python -m bench`` with options of their own, a module each. Imports nothing heavy."""
