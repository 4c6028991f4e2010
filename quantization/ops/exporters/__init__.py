"""What exporters of torch make of the operators."""
