"""Encoders: the RRDB network and its files."""
