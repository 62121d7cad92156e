"""Draft heads: the contract, the registry, and one folder per head."""
