"""What a quantization is made of: granularity, parameters, rules, codes and their packing."""
