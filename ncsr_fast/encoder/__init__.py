"""Encoders: RRDB networks with their files, and LLFlow's."""
