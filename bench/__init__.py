"""Measurement. The files here are the commands, each an argument parser and a call; the folders do the work."""
