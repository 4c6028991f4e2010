"""What is printed for a reader: tables, sizes, progress."""
