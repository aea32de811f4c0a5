"""Linear heads' inner loop and multi-head losses on chips that need not be there: their launches by emulation."""
