"""A model looked at: what is to become of it, what it is, why, and what is wrong with it."""
