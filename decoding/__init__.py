"""Decoding with a backbone and a head: draft a tree, verify it in one pass, accept a path; the door is generate.py."""
