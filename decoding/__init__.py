"""Drafting, verifying and accepting: from a prompt, a backbone and a head to text."""
