"""The arguments of every op by name: pure data, which every layer above reads."""
