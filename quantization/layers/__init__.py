"""Modules that keep their weight as codes: int8, packed, embedding, and what they share."""
