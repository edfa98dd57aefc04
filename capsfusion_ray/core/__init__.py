"""Pure rules: values in, values out. No store, no Ray, no torch."""
