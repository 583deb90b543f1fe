"""Measurements: what the programs cost, on this machine or on a GPU that is not there."""
