"""Draft heads, a folder each, and what they share; the contract is base.py and the door is registry.py."""
