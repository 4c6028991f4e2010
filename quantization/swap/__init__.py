"""One layer of a model into another: walking, patterns, the two-phase engine, the report."""
