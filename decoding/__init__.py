"""Decodes with a backbone and a head: drafts a tree of tokens, verifies it in one pass, accepts a path; the door is
generate.py."""
