"""Context parallelism predicted from a cost model, measured on the machine at hand, and drawn."""
