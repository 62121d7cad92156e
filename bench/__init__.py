"""Measurement: the commands lie here, each an argument parser and a call; what they do lies in the folders."""
